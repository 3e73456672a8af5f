#!/usr/bin/env bash
# How often is the verdict of `slm pilot` wrong? See README.md.
#   SLM_DATA=folder experiments/2026-11-30_pilot/run.sh [output folder]      a quarter of an hour on two quiet cores
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out/text" && cd "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
seeds=${SLM_SEEDS:-9}             # arms that the replays draw from
budget=${SLM_BUDGET:-20_480}      # tokens of a pilot's arm: 20 steps of 1,024
full=${SLM_FULL:-81_920}          # of an arm of the full result

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
    slm prepare out="corpora/$1" "sources=[$(tr -s '\n ' ' ' <<< "$2")]" "$3" heldout_ratio="$4" seq_len=64 "${@:5}"
}
shared=tokenizer.path=corpora/noisy/train/tokenizer
prepare noisy "$noisy" tokenizer.vocab_size=1024 0.03 "exclude=[$tests]"
prepare curated "$curated" "$shared" 0 "exclude=[$tests]"
prepare tests "$tests" "$shared" 1

# The base, a reference on curated text, and one on the corpus itself, whose held-out text is the corpus's own. The
# base as a reference knows nothing that the target does not.
small=(model.architecture.hidden_size=64 model.architecture.intermediate_size=176 model.architecture.num_hidden_layers=2
    model.architecture.num_attention_heads=2 model.architecture.num_key_value_heads=2)
batch=(data.batch_size=16 data.micro_batch_size=16)
train() { slm train out="runs/$1" data.corpus="corpora/$2/train" selection=all logger=csv "${batch[@]}" "${@:3}"; }
base=model.init_from=runs/base/model
train base noisy optimizer.adamw.lr=3e-3 max_tokens=409_600 "${small[@]}"
train reference curated "$base" max_tokens=204_800
train itself noisy "$base" max_tokens=204_800 seed=1

pilot() { # folder, reference, held-out text, tokens of an arm, seeds, more
    slm pilot out="pilots/$1" corpus=corpora/noisy/train reference_model="runs/$2/model" "$base" "heldout={held: corpora/$3/heldout}" \
        budget="$4" seeds="$5" max_seeds="$5" select_ratios=[0.6] heldout_windows=192 "${batch[@]}" "${@:6}"
}
pilot helps reference tests "$budget" "$seeds" curated=corpora/curated/train
pilot itself itself noisy "$budget" 5
pilot nothing base noisy "$budget" 4
pilot helps_full reference tests "$full" 3 curated=corpora/curated/train
python "$here/replay.py" "$out"
