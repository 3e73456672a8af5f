#!/usr/bin/env bash
# What does a backward pass along selected rows alone cost in quality? See README.md.
#   SLM_DATA=folder experiments/2026-11-30_selected_backward/run.sh [output folder]    40 minutes on two cores
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
prepare gsm8k_test "{path: '$data/eval/gsm8k_test.jsonl', $gsm}" "$shared" 1
prepare math_500 "{path: '$data/eval/math_500.jsonl', $math}" "$shared" 1

sets="{gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout, noisy: corpora/noisy/heldout}"
quarter=$((${tokens//_/} / 4))
train() { # folder, corpus, more
    slm train out="runs/$1" data.corpus="corpora/$2/train" "data.heldout=$sets" logger=csv \
        callbacks.heldout.every_tokens=$quarter data.heldout_windows=128 "${@:3}"
}
base=model.init_from=runs/base/model
train base noisy selection=all optimizer.adamw.lr=3e-3 max_tokens="${SLM_BASE_TOKENS:-819_200}"
train reference curated selection=all "$base" max_tokens="${SLM_BASE_TOKENS:-819_200}"
slm score corpus=corpora/noisy/train reference_model=runs/reference/model out=references/noisy

# FLOPs and seconds of a step, and the tokens that as many FLOPs are worth.
PYTHONPATH="$here/../benchmarks" python "$here/costs.py" runs/base/model corpora/noisy/train references/noisy "${tokens//_/}"

target=("$base" seed="$seeds" hydra/launcher=joblib hydra.launcher.n_jobs="$jobs")
excess=("${target[@]}" selection=excess data.references=references/noisy)
states=(callbacks.checkpoints.every_tokens=$quarter callbacks.checkpoints.keep=null)   # for gradients.py
train all noisy selection=all max_tokens="$tokens" "${target[@]}" -m
train excess noisy model.backward=exact,selected selection.select_ratio=0.6,0.4,0.2 max_tokens="$tokens" \
    "${states[@]}" "${excess[@]}" -m
# The schedule ends with the run, so that more tokens are another run.
longer=()
for line in $(tail -n +2 costs.csv | cut -d, -f1,2); do
    k=${line%,*}
    train "flops_$k" noisy model.backward=selected selection.select_ratio="$k" max_tokens="${line#*,}" \
        "${excess[@]}" -m
    longer+=("selected $k at equal FLOPs: runs/flops_$k")
done
train random noisy selection=random selection.select_ratio=0.6,0.4 max_tokens="$tokens" "${target[@]}" -m

runs='runs=[runs/all, runs/excess, runs/random]' reference='reference model: runs/reference'
slm report "$runs" out=report "baselines={$reference}"
slm report "$runs" out=report_flops "baselines={$(printf '%s, ' "${longer[@]}")$reference}"
python "$here/results.py" costs.csv runs figures
python "$here/gradients.py" runs/excess corpora/noisy/train references/noisy figures
cp report_flops/table.csv "$here/results.csv"
cp report/loss_vs_k.png "$here/figure.png"
cp report/loss_vs_tokens_gsm8k_test.png "$here/loss_vs_tokens.png"
cp costs.csv figures/differences.csv figures/gradients.csv figures/cost.png figures/angle.png "$here"
