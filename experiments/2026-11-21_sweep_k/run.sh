#!/usr/bin/env bash
# Every k with its random control, every rule, three seeds; see README.md.
#   SLM_DATA=folder experiments/2026-11-21_sweep_k/run.sh [output folder]      an hour on two cores
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out/text" && cd "$out"
tokens=${SLM_TOKENS:-409_600}   # 100 steps of 4,096
seeds=${SLM_SEEDS:-0,1,2}
jobs=${SLM_JOBS:-2}             # trainings at once
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The curated text is halved by line: one half hides in the corpus, the other trains the reference.
for name in gsm8k_train math_train_4500; do
    awk 'NR % 3 == 0' "$data/curated/$name.jsonl" > "text/$name.hidden.jsonl"
    awk 'NR % 3 != 0' "$data/curated/$name.jsonl" > "text/$name.reference.jsonl"
done
gsm='text: "{question}\n{answer}"' math='text: "{problem}\n{solution}"'
threads='text: "{question.title}\n{question.body_html}\n{answers[].body_html}"'
noisy="{path: '$data/raw/planetmath_nt.jsonl'}, {path: '$data/raw/se_*.jsonl', name: threads, $threads},
    {path: '$data/raw/aqua_*.jsonl', name: aqua, text: \"{question}\n{rationale}\"},
    {path: '$data/general/*.txt', name: general, document: paragraph},
    {path: text/gsm8k_train.hidden.jsonl, name: gsm8k, $gsm}, {path: text/math_train_4500.hidden.jsonl, name: math, $math}"
curated="{path: text/gsm8k_train.reference.jsonl, name: gsm8k_curated, $gsm},
    {path: text/math_train_4500.reference.jsonl, name: math_curated, $math}"
tests="{path: '$data/eval/gsm8k_test.jsonl', $gsm}, {path: '$data/eval/math_500.jsonl', $math}"

prepare() { # folder, sources, tokenizer, share that is held out
    slm prepare out="corpora/$1" "sources=[$(tr -s '\n ' ' ' <<< "$2")]" "$3" heldout_ratio="$4" seq_len=128 "${@:5}"
}
shared=tokenizer.path=corpora/noisy/train/tokenizer
prepare noisy "$noisy" tokenizer.vocab_size=4096 0.02 "exclude=[$tests]"
prepare curated "$curated" "$shared" 0 "exclude=[$tests]"
prepare mixed "$noisy, $curated" "$shared" 0.02 "exclude=[$tests]"
prepare gsm8k_test "{path: '$data/eval/gsm8k_test.jsonl', $gsm}" "$shared" 1
prepare math_500 "{path: '$data/eval/math_500.jsonl', $math}" "$shared" 1

sets="{gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout, noisy: corpora/noisy/heldout}"
train() { # folder, corpus, more
    slm train out="runs/$1" data.corpus="corpora/$2/train" "data.heldout=$sets" logger=csv \
        callbacks.heldout.every_tokens=51_200 data.heldout_windows=128 "${@:3}"
}
base=model.init_from=runs/base/model
train base noisy selection=all optimizer.adamw.lr=3e-3 max_tokens=819_200
train reference curated selection=all "$base" max_tokens=819_200
slm score corpus=corpora/noisy/train reference_model=runs/reference/model out=references/noisy entropy=true

target=("$base" data.references=references/noisy max_tokens="$tokens")
atonce=(hydra/launcher=joblib hydra.launcher.n_jobs="$jobs")
# The paper's Figure 9 with its control: k, random k, all tokens (k = 1).
train sweep noisy experiment=sweep_k seed="$seeds" "${target[@]}" "${atonce[@]}"
# Other ways to choose, at k = 0.6 where they have one, and soft weights.
train rules noisy selection=loss,middle,reference_loss,intersection,mixture,sigmoid,softmax,relu \
    seed="$seeds" "${target[@]}" "${atonce[@]}" -m
# What a sceptic would do: train on the curated text as well.
train mixed mixed selection=all seed="$seeds" "$base" max_tokens="$tokens" "${atonce[@]}" -m

lines='baselines={reference model: runs/reference, curated text mixed in: runs/mixed}'
slm report runs=runs/sweep out=report_k "$lines"
slm report 'runs=[runs/sweep, runs/rules]' out=report_rules "$lines"
cp report_rules/table.csv "$here/results.csv"
cp report_k/loss_vs_k.png "$here/figure.png"
cp report_k/loss_vs_tokens.png "$here/loss_vs_tokens.png"
cp report_rules/loss_vs_k.png "$here/rules.png"
