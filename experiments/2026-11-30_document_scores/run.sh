#!/usr/bin/env bash
# Scores of documents beside those of windows, and a reference with another tokenizer; see README.md.
#   SLM_DATA=folder experiments/2026-11-30_document_scores/run.sh [output folder]      25 minutes on one core
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out/text" && cd "$out"
tokens=${SLM_TOKENS:-163_840}   # 40 steps of 4,096
long=${SLM_LONG:-409_600}       # of bases and references
seeds=${SLM_SEEDS:-0,1}
jobs=${SLM_JOBS:-1}             # trainings at once
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The curated text is halved by line: one part hides in the corpus, the other trains the references.
for name in gsm8k_train math_train_4500; do
    awk 'NR % 6 == 0' "$data/curated/$name.jsonl" > "text/$name.hidden.jsonl"
    awk 'NR % 3 != 0' "$data/curated/$name.jsonl" > "text/$name.reference.jsonl"
done
gsm='text: "{question}\n{answer}"' math='text: "{problem}\n{solution}"'
# Labels of signal and noise: an entry's prose against its TeX preamble; prose against injected noise.
noisy="{path: '$data/raw/planetmath_nt.jsonl', name: planetmath, signal: body, weight: 0.4},
    {path: '$data/raw/aqua_*.jsonl', name: aqua, text: \"{question}\n{rationale}\"},
    {path: '$data/general/wikitext2_valid.txt', name: general, document: paragraph, noise: 0.25},
    {path: text/gsm8k_train.hidden.jsonl, name: gsm8k, $gsm}, {path: text/math_train_4500.hidden.jsonl, name: math, $math}"
curated="{path: text/gsm8k_train.reference.jsonl, name: gsm8k_curated, $gsm},
    {path: text/math_train_4500.reference.jsonl, name: math_curated, $math}"
tests="{path: '$data/eval/gsm8k_test.jsonl', $gsm}, {path: '$data/eval/math_500.jsonl', $math}"

prepare() { # folder, sources, tokenizer, share that is held out
    slm prepare out="corpora/$1" "sources=[$(tr -s '\n ' ' ' <<< "$2")]" "$3" heldout_ratio="$4" seq_len=128 "${@:5}"
}
own=tokenizer.path=corpora/noisy/train/tokenizer other=tokenizer.path=corpora/other_curated/train/tokenizer
prepare noisy "$noisy" tokenizer.vocab_size=4096 0.1 "exclude=[$tests]"
prepare curated "$curated" "$own" 0 "exclude=[$tests]"
prepare gsm8k_test "{path: '$data/eval/gsm8k_test.jsonl', $gsm}" "$own" 1
prepare math_500 "{path: '$data/eval/math_500.jsonl', $math}" "$own" 1
# The other reference has a tokenizer of its own, trained on curated text, and all else alike.
prepare other_curated "$curated" tokenizer.vocab_size=4096 0 "exclude=[$tests]"
prepare other_noisy "$noisy" "$other" 0.1 "exclude=[$tests]"
prepare other_gsm8k_test "{path: '$data/eval/gsm8k_test.jsonl', $gsm}" "$other" 1

sets="{gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout, noisy: corpora/noisy/heldout}"
train() { # folder, corpus, more
    slm train out="runs/$1" data.corpus="corpora/$2/train" logger=csv "${@:3}"
}
for kind in '' other_; do
    train "${kind}base" "${kind}noisy" selection=all optimizer.adamw.lr=3e-3 max_tokens="$long"
    train "${kind}reference" "${kind}curated" selection=all model.init_from="runs/${kind}base/model" max_tokens="$long"
done

# Which of the two is the better model of its text: bits per byte, each in its own tokens.
slm evaluate 'models={own tokenizer: runs/reference/model}' \
    'sets={gsm8k_test: corpora/gsm8k_test/heldout, noisy: corpora/noisy/heldout}' out=own.csv
slm evaluate 'models={other tokenizer: runs/other_reference/model}' \
    'sets={gsm8k_test: corpora/other_gsm8k_test/heldout, noisy: corpora/other_noisy/heldout}' out=other.csv
(cat own.csv && tail -n +2 other.csv) > "$here/references.csv"

for side in train heldout; do
    corpus=corpora/noisy/$side
    slm score corpus="$corpus" reference_model=runs/reference/model out="references/windows/$side"
    slm score layout=documents corpus="$corpus" reference_model=runs/reference/model out=scores/documents
    slm score layout=documents corpus="$corpus" reference_model=runs/other_reference/model out=scores/other
    slm bind corpus="$corpus" scores=scores/documents out="references/documents/$side"
    slm bind corpus="$corpus" scores=scores/other out="references/other/$side"
done
python "$here/agreement.py" runs/base/model corpora/noisy references "$here/agreement.csv"

target=(model.init_from=runs/base/model max_tokens="$tokens" seed="$seeds" "data.heldout=$sets" data.heldout_windows=128
    callbacks.heldout.every_tokens="$tokens" hydra/launcher=joblib hydra.launcher.n_jobs="$jobs" -m)
for name in windows documents other; do
    train "$name" noisy selection=excess selection.select_ratio=0.4,0.6 data.references="references/$name/train" "${target[@]}"
done
train random noisy selection=random selection.select_ratio=0.4,0.6 "${target[@]}"
train all noisy selection=all "${target[@]}"
python "$here/collect.py" runs "$here"
