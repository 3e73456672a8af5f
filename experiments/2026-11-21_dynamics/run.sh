#!/usr/bin/env bash
# What becomes of every token of a held-out set, under all tokens, random tokens and excess; see README.md.
#   SLM_DATA=folder experiments/2026-11-21_dynamics/run.sh [output folder]      40 minutes on two cores
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out/text" && cd "$out"
tokens=${SLM_TOKENS:-409_600}   # 100 steps of 4,096
seeds=${SLM_SEEDS:-0,1}
jobs=${SLM_JOBS:-2}             # trainings at once
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The curated text is halved by line: one part hides in the corpus, the other trains the reference.
for name in gsm8k_train math_train_4500; do
    awk 'NR % 3 == 0' "$data/curated/$name.jsonl" > "text/$name.hidden.jsonl"
    awk 'NR % 3 != 0' "$data/curated/$name.jsonl" > "text/$name.reference.jsonl"
done
gsm='text: "{question}\n{answer}"' math='text: "{problem}\n{solution}"'
threads='text: "{question.title}\n{question.body_html}\n{answers[].body_html}"'
# Labels of signal and noise: an entry's prose against its TeX preamble; prose against injected noise.
noisy="{path: '$data/raw/planetmath_nt.jsonl', name: planetmath, signal: body},
    {path: '$data/raw/se_*.jsonl', name: threads, $threads},
    {path: '$data/raw/aqua_*.jsonl', name: aqua, text: \"{question}\n{rationale}\"},
    {path: '$data/general/*.txt', name: general, document: paragraph, noise: 0.25},
    {path: text/gsm8k_train.hidden.jsonl, name: gsm8k, $gsm}, {path: text/math_train_4500.hidden.jsonl, name: math, $math}"
curated="{path: text/gsm8k_train.reference.jsonl, name: gsm8k_curated, $gsm},
    {path: text/math_train_4500.reference.jsonl, name: math_curated, $math}"
tests="{path: '$data/eval/gsm8k_test.jsonl', $gsm}, {path: '$data/eval/math_500.jsonl', $math}"

prepare() { # folder, sources, tokenizer, share that is held out
    slm prepare out="corpora/$1" "sources=[$(tr -s '\n ' ' ' <<< "$2")]" "$3" heldout_ratio="$4" seq_len=128 "${@:5}"
}
shared=tokenizer.path=corpora/noisy/train/tokenizer
prepare noisy "$noisy" tokenizer.vocab_size=4096 0.1 "exclude=[$tests]"
prepare curated "$curated" "$shared" 0 "exclude=[$tests]"
prepare gsm8k_test "{path: '$data/eval/gsm8k_test.jsonl', $gsm}" "$shared" 1

sets='{gsm8k_test: corpora/gsm8k_test/heldout, noisy: corpora/noisy/heldout}'
train() { # folder, corpus, more
    slm train out="runs/$1" data.corpus="corpora/$2/train" "data.heldout=$sets" data.heldout_windows=128 "${@:3}"
}
frozen=(callbacks=dynamics callbacks.dynamics.corpus=corpora/noisy/heldout)
base=model.init_from=runs/base/model
train base noisy selection=all optimizer.adamw.lr=3e-3 max_tokens=819_200 callbacks.heldout.every_tokens=40_960 "${frozen[@]}"
train reference curated selection=all "$base" max_tokens=819_200 callbacks.heldout.every_tokens=40_960 logger=csv
for side in train heldout; do
    slm score corpus="corpora/noisy/$side" reference_model=runs/reference/model out="references/$side"
done
target=("$base" data.references=references/train max_tokens="$tokens" seed="$seeds"
    callbacks.heldout.every_tokens=$((${tokens//_/} / 20))
    "${frozen[@]}" callbacks.dynamics.references=references/heldout
    hydra/launcher=joblib hydra.launcher.n_jobs="$jobs")
# k = 1.0 trains on all tokens: the control.
train excess noisy selection=excess selection.select_ratio=0.4,1.0 "${target[@]}" -m
train random noisy selection=random selection.select_ratio=0.4 "${target[@]}" -m

slm report 'runs=[runs/excess, runs/random]' out=report
slm report runs=runs/base out=report_base

python "$here/collect.py" "$out"
figures=report/figures
cp "$figures/selection-excess_k=0.4_seed_0.png" "$here/figure.png"
for kind in classes perplexity text-selected; do
    cp "$figures/$kind-excess_k=0.4_seed_0.png" "$here/$kind.png"
done
cp "$figures/classes-all_tokens_seed_0.png" "$here/classes_of_all_tokens.png"
