#!/usr/bin/env bash
# A curated corpus by a classifier of 300 labels, its reference, what that selects; see README.md.
#   SLM_DATA=folder experiments/2026-11-30_quality/run.sh [output folder]      half an hour on one core
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out/text" && cd "$out"
tokens=${SLM_TOKENS:-98_304}    # 96 steps of 1,024
base_tokens=${SLM_BASE_TOKENS:-196_608}
seeds=${SLM_SEEDS:-0,1}
jobs=${SLM_JOBS:-1}             # trainings at once
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The corpus: mathematics of the domain is a third of each curated file, by line, among noisy and general text.
for name in gsm8k_train math_train_4500; do
    awk 'NR % 3 == 0' "$data/curated/$name.jsonl" > "text/$name.jsonl"
done
gsm='text: "{question}\n{answer}"' math='text: "{problem}\n{solution}"'
threads='text: "{question.title}\n{question.body_html}\n{answers[].body_html}"'
sources=$(tr -s '\n ' ' ' <<< "[{path: text/gsm8k_train.jsonl, name: gsm8k, $gsm},
    {path: text/math_train_4500.jsonl, name: math, $math},
    {path: '$data/raw/aqua_*.jsonl', name: aqua, text: \"{question}\n{rationale}\"},
    {path: '$data/raw/planetmath_nt.jsonl', name: planetmath}, {path: '$data/raw/se_*.jsonl', name: threads, $threads},
    {path: '$data/general/wikitext2_*.txt', name: wikitext, document: paragraph},
    {path: '$data/general/tinyshakespeare.txt', name: shakespeare, document: paragraph}]")
sources=${sources% }  # the line end
tests="{path: '$data/eval/gsm8k_test.jsonl', $gsm}, {path: '$data/eval/math_500.jsonl', $math}"

prepare() { # folder, sources, tokenizer, share that is held out, more
    slm prepare out="corpora/$1" "sources=$2" "$3" heldout_ratio="$4" seq_len=128 "${@:5}"
}
own=tokenizer.path=corpora/corpus/train/tokenizer
prepare corpus "$sources" tokenizer.vocab_size=2048 0.02 "exclude=[$tests]"
prepare gsm8k_test "[{path: '$data/eval/gsm8k_test.jsonl', $gsm}]" "$own" 1
prepare math_500 "[{path: '$data/eval/math_500.jsonl', $math}]" "$own" 1

sets="{gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout}"
train() { # folder, tokens, more
    slm train out="runs/$1" max_tokens="$2" "data.heldout=$sets" data.heldout_windows=8 logger=csv model=llama_600k \
        data.batch_size=8 data.micro_batch_size=8 callbacks.heldout.every_tokens="$2" callbacks.heldout.batch_size=32 "${@:3}"
}
train base "$base_tokens" data.corpus=corpora/corpus/train selection=all optimizer.adamw.lr=3e-3
base=model.init_from=runs/base/model

# 300 labels, two classifiers, their scores of all documents, and the first one's dealt out at random.
slm annotate "sources=$sources" served_model=stand-in requests=requests.jsonl
[ -e answers.jsonl ] || python "$here/answer.py" "$sources" answers.jsonl
slm annotate "sources=$sources" served_model=stand-in responses=answers.jsonl out=labels.jsonl
slm quality labels=labels.jsonl features=hashed out=quality/hashed
slm quality labels=labels.jsonl features=hidden base_model=runs/base/model context=127 out=quality/hidden
for name in hashed hidden; do
    [ -e "scores/$name/manifest.json" ] || slm quality classifier="quality/$name" "sources=$sources" out="scores/$name"
done
python "$here/deal.py" scores/hashed scores/random

# A curated corpus each: the classifier's own words, looked-up scores, as many documents by chance, those of the domain.
curated() { # name, what keeps
    prepare "$1" "$sources" "$own" 0 "exclude=[$tests]" "keep={by: $2, over: 3}"
    train "reference_$1" "$tokens" data.corpus="corpora/$1/train" selection=all "$base"
    slm score corpus=corpora/corpus/train reference_model="runs/reference_$1/model" out="references/$1" \
        max_tokens="$tokens"    # the same windows for all
}
curated hashed quality/hashed
curated hidden scores/hidden
curated random scores/random
curated truth "$(python "$here/deal.py" scores/hashed scores/truth gsm8k math "$sources")"

arm() { # folder, more
    train "$1" "$tokens" "${@:2}" "$base" seed="$seeds" hydra/launcher=joblib hydra.launcher.n_jobs="$jobs" -m
}
corpus=data.corpus=corpora/corpus/train
for name in hashed hidden random truth; do
    arm "excess_$name" "$corpus" data.references="references/$name" selection=excess selection.select_ratio=0.6
done
arm all "$corpus" data.references=references/hashed selection=all
arm random_0.6 "$corpus" data.references=references/hashed selection=random selection.select_ratio=0.6
arm mixed_all 'data.mixture={corpus: {corpus: corpora/corpus/train, share: 0.8}, kept: {corpus: corpora/hashed/train, share: 0.2}}' \
    selection=all

models="base: runs/base/model"
for name in hashed hidden random truth; do models+=", reference_$name: runs/reference_$name/model"; done
for folder in runs/{all,random_0.6,excess_hashed,excess_hidden,excess_random,excess_truth,mixed_all}/*/; do
    models+=", $(basename "$(dirname "$folder")")/$(basename "$folder" | tr -d =): '${folder}model'"
done
slm evaluate "models={$models}" out=evaluation.csv max_windows=128 batch_size=64 \
    "sets={gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout, corpus: corpora/corpus/heldout}"
python "$here/results.py" "$out"
