#!/usr/bin/env bash
# Windows of 128 to 512 tokens: RoPE base, naturally long text against pieces, long_gain; see README.md.
#   SLM_DATA=folder experiments/2026-11-30_long_context/run.sh [output folder]      a quarter of an hour on one core
# Every stage can be stopped and run again. SLM_DATA is what experiments/fetch_data.py fetches.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${1:-$here/out}
mkdir -p "$out" && cd "$out"
tokens=${SLM_TOKENS:-393_216}   # in windows of 128
longer=${SLM_LONGER:-131_072}   # after that, in windows of 512
seeds=${SLM_SEEDS:-0 1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

prepare() { # folder, sources, window, share that is held out, tokenizer
    slm prepare out="corpora/$1" "sources=[$2]" seq_len="$3" heldout_ratio="$4" "$5"
}
# Half of the naturally long entries of PlanetMath: those of 512 tokens and more, twice as often from 2,048 on.
entries="{path: '$data/raw/planetmath_nt.jsonl', weight: 0.5, min_tokens: 512, weight_long: {over: 2048, times: 2}}"
problems="{path: '$data/curated/gsm8k_train.jsonl', text: \"{question}\n{answer}\"}"
prepare base "$entries, $problems" 128 0.1 tokenizer.vocab_size=2048
own=tokenizer.path=corpora/base/train/tokenizer
prepare natural "$entries" 512 0.1 "$own"
prepare short "$entries" 128 0.1 "$own"
# The same tokens as pieces of 64 in another order, packed together.
python "$here/pieces.py" corpora/natural/train pieces.jsonl
prepare pieces "{path: pieces.jsonl}" 512 0 "$own"

train() { # folder, corpus, tokens, seed, more
    slm train out="runs/$1" data.corpus="corpora/$2/train" max_tokens="$3" seed="$4" logger=csv \
        callbacks.heldout.every_tokens="$3" data.heldout_windows=32 "${@:5}"
}
held='data.heldout={natural: corpora/natural/heldout}'
windows='model.override={max_position_embeddings: 512'
for seed in $seeds; do
    train "base_$seed" base "$tokens" "$seed" selection=all optimizer.adamw.lr=3e-3 data.batch_size=16 \
        data.micro_batch_size=16 model.architecture.max_position_embeddings=128
    from=model.init_from=runs/base_$seed/model
    # What 128 tokens leave to be gained: the model itself, with as many before each. Its windows are those that all arms
    # of this text read.
    slm score corpus=corpora/natural/train reference_model="runs/base_$seed/model" context=128 stride=64 \
        max_tokens="$longer" out="references/$seed"
    scored="data.references=references/$seed"
    arm() { # name, corpus, override or "", more
        train "$1_$seed" "$2" "$longer" "$seed" "$from" optimizer.adamw.lr=1e-3 \
            data.micro_batch_size=8 "${@:4}" ${3:+"$3"}
    }
    arm short short "" selection=all data.batch_size=32
    arm natural natural "$windows}" selection=all data.batch_size=8 "$held" "$scored"
    arm natural_rope natural "$windows, rope_theta: 50000}" selection=all data.batch_size=8 "$held" "$scored"
    arm pieces pieces "$windows}" selection=all data.batch_size=8 "$held"
    arm pieces_rope pieces "$windows, rope_theta: 50000}" selection=all data.batch_size=8 "$held"
    arm gain_rope natural "$windows, rope_theta: 50000}" selection=long_gain selection.select_ratio=0.6 data.batch_size=8 \
        "$held" "$scored"
    arm random_rope natural "$windows, rope_theta: 50000}" selection=random selection.select_ratio=0.6 data.batch_size=8 \
        "$held" "$scored"
done

# Before and after: models of 128 positions are asked for 512 all the same, also with the other base.
models=$(for run in runs/*; do echo "$(basename "$run"): $run/model"; done | paste -sd,)
before=$(for seed in $seeds; do echo "base_rope_$seed: runs/base_$seed/model"; done | paste -sd,)
sets='sets={natural: corpora/natural/heldout}' room='{max_position_embeddings: 512}'
slm evaluate "models={$models}" "$sets" 'by_position=[32,64,128,256,384]' "override=$room" max_windows=96 batch_size=8 out=positions.csv
slm evaluate "models={$before}" "$sets" 'by_position=[32,64,128,256,384]' max_windows=96 batch_size=8 \
    'override={max_position_embeddings: 512, rope_theta: 50000}' out=positions_rope.csv
slm needle "models={$models}" "$sets" 'lengths=[128,512]' 'depths=[0,0.5,1]' samples=16 "override=$room" out=needle.csv
python "$here/results.py" . "$here"
