#!/usr/bin/env bash
# A domain kept out of a small model: by tokens, by documents, by chance; see README.md.
#   SLM_DATA=folder experiments/2026-11-30_forgetting/run.sh [output folder]      an hour on one core
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out/text" && cd "$out"
tokens=${SLM_TOKENS:-196_608}   # 192 steps of 1,024
tuned=${SLM_TUNED:-65_536}      # of both references
again=${SLM_AGAIN:-32_768}      # of learning the domain again
seeds=${SLM_SEEDS:-0,1,2}
jobs=${SLM_JOBS:-1}             # trainings at once
shares=${SLM_SHARES:-3 10 25 50}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python "$here/texts.py" "$data" text
gsm='text: "{question}\n{answer}"' math='text: "{problem}\n{solution}"'
prepare() { # folder, sources, tokenizer, share that is held out
    slm prepare out="corpora/$1" "sources=[$2]" "$3" heldout_ratio="$4" seq_len=128
}
sources() { # folder, more
    local name
    for name in general near domain; do echo "{path: $1/$name.jsonl, name: $name, signal: domain$2}"; done | paste -sd,
}
own=tokenizer.path=corpora/corpus/train/tokenizer
prepare corpus "$(sources text '')" tokenizer.vocab_size=2048 0
prepare curated "{path: text/curated.jsonl}" "$own" 0
prepare gsm8k_test "{path: '$data/eval/gsm8k_test.jsonl', $gsm}" "$own" 1
prepare math_500 "{path: '$data/eval/math_500.jsonl', $math}" "$own" 1
prepare wikitext "{path: '$data/general/wikitext2_valid.txt', document: paragraph}" "$own" 1

sets="{gsm8k_test: corpora/gsm8k_test/heldout, math_500: corpora/math_500/heldout, wikitext: corpora/wikitext/heldout}"
corpus=corpora/corpus/train
every=$tokens windows=128
train() { # folder, corpus, tokens, more
    slm train out="runs/$1" data.corpus="$2" max_tokens="$3" "data.heldout=$sets" data.heldout_windows="$windows" logger=csv \
        data.batch_size=8 data.micro_batch_size=8 callbacks.heldout.batch_size=32 callbacks.heldout.every_tokens="$every" "${@:4}"
}
# Two references of one base: one goes on with the corpus, the other with problems that are not in it.
train base "$corpus" "$tokens" selection=all optimizer.adamw.lr=3e-3
train general_reference "$corpus" "$tuned" selection=all model.init_from=runs/base/model
train domain_reference corpora/curated/train "$tuned" selection=all model.init_from=runs/base/model
for name in general domain; do
    slm score corpus="$corpus" reference_model="runs/${name}_reference/model" out="references/$name"
done
# For each share: the bound in nats above which it lies, and the corpus with as many tokens of whole documents left out.
python "$here/choose.py" "$corpus" references text chosen "$here" $shares
for share in $shares; do
    prepare "without_$share" "$(sources "chosen/$share" ', token_weight: keep')" "$own" 0
done

arm() { # folder, corpus, more: from new weights
    train "$1" "$2" "$tokens" optimizer.adamw.lr=3e-3 seed="$seeds" hydra/launcher=joblib \
        hydra.launcher.n_jobs="$jobs" "${@:3}" -m
}
two='data.references=[references/general,references/domain]'
arm all "$corpus" selection=all
for share in $shares; do
    left=$(awk "BEGIN { print 1 - $share / 100 }")
    bound=$(cat "chosen/$share/max_gain")
    for mode in mask replace; do
        arm "${mode}_$share" "$corpus" selection=forget selection.select_ratio=null selection.max_gain="$bound" \
            selection.mode=$mode "$two" data.combine=domain
    done
    arm "documents_$share" "corpora/without_$share/train" selection=all
    arm "random_$share" "$corpus" selection=random selection.select_ratio="$left"
done

# How many tokens of the domain bring back the loss that all tokens had?
every=2_048 windows=32 sets="{gsm8k_test: corpora/gsm8k_test/heldout}"
for name in all mask_10 documents_10 mask_25 replace_25 documents_25; do
    for folder in runs/"$name"/*/; do
        seed=$(basename "$folder" | grep -o 'seed=[0-9]*' | tr = _)
        train "again/$name/$seed" corpora/curated/train "$again" selection=all model.init_from="'${folder}model'"
    done
done
python "$here/results.py" runs "$here"
