#!/usr/bin/env bash
# Selective language modeling on mathematics in a noisy corpus, against its controls; see README.md.
#   SLM_DATA=folder experiments/2026-11-21_math/run.sh [output folder]      half an hour on two cores
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out/text" && cd "$out"
tokens=${SLM_TOKENS:-819_200}   # 200 steps of 4,096
seeds=${SLM_SEEDS:-0,1,2}

# The curated text is halved by line: one half hides in the corpus, the other trains the reference.
for name in gsm8k_train math_train_4500; do
    awk 'NR % 3 == 0' "$data/curated/$name.jsonl" > "text/$name.hidden.jsonl"
    awk 'NR % 3 != 0' "$data/curated/$name.jsonl" > "text/$name.reference.jsonl"
done
gsm='text: "{question}\n{answer}"' math='text: "{problem}\n{solution}"'
threads='text: "{question.title}\n{question.body_html}\n{answers[].body_html}"'
noisy="{path: '$data/raw/planetmath_nt.jsonl'}, {path: '$data/raw/se_*.jsonl', $threads},
    {path: '$data/raw/aqua_*.jsonl', text: \"{question}\n{rationale}\"},
    {path: '$data/general/*.txt', document: paragraph},
    {path: text/gsm8k_train.hidden.jsonl, $gsm}, {path: text/math_train_4500.hidden.jsonl, $math}"
curated="{path: text/gsm8k_train.reference.jsonl, $gsm},
    {path: text/math_train_4500.reference.jsonl, $math}"
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

sets="{gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout}"
train() { # folder, corpus, more
    slm train out="runs/$1" data.corpus="corpora/$2/train" "data.heldout=$sets" logger=csv \
        max_tokens="$tokens" callbacks.heldout.every_tokens=102_400 \
        data.heldout_windows=128 "${@:3}"
}
base=model.init_from=runs/base/model
train base noisy selection=all optimizer.adamw.lr=3e-3
train reference curated selection=all "$base"
slm score corpus=corpora/noisy/train reference_model=runs/reference/model out=references/noisy

sweep() { train "$1" "$2" "${@:3}" "$base" seed="$seeds" -m; }
scored=data.references=references/noisy
sweep all noisy selection=all "$scored"
sweep random_0.6 noisy selection=random selection.select_ratio=0.6 "$scored"
sweep excess_0.6 noisy selection=excess selection.select_ratio=0.6 "$scored"
sweep excess_0.4 noisy selection=excess selection.select_ratio=0.4 "$scored"
sweep mixed_all mixed selection=all

models="base: runs/base/model, reference: runs/reference/model"
for folder in runs/{all,random_0.6,excess_0.6,excess_0.4,mixed_all}/*/; do
    name=$(basename "$(dirname "$folder")")
    models+=", $name/$(basename "$folder" | tr -d =): '${folder}model'"
done
slm evaluate "models={$models}" out=evaluation.csv max_windows=512 \
    "sets={gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout, noisy: corpora/noisy/heldout}"
python "$here/results.py" "$out"
