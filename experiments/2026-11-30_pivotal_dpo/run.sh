#!/usr/bin/env bash
# DPO on pivotal tokens beside DPO on responses, on sums of four numbers; see README.md.
#   experiments/2026-11-30_pivotal_dpo/run.sh [output folder]      15 minutes of one core
# Every slm command can be stopped and run again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/out}
seeds=${SLM_SEEDS:-0 1 2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out" && cd "$out"
python "$here/sums.py" text
prepare() { slm prepare out="$1" "sources=[$2]" "$3" seq_len="$4" heldout_ratio=0 num_proc=1; }
prepare base "{path: text/base.jsonl}" tokenizer.vocab_size=258 64  # the bytes, EOS, padding
prepare sft '{path: text/sft.jsonl, prompt: "{prompt}"}' tokenizer.path=base/train/tokenizer 128
train() { # folder, corpus, rate, windows a step, more
    slm train out="runs/$1" data.corpus="$2/train" selection=all max_tokens=600_000 optimizer.adamw.lr="$3" \
        data.batch_size="$4" data.micro_batch_size="$4" logger=csv "${@:5}"
}
size="model.architecture.hidden_size=64 model.architecture.intermediate_size=192 model.architecture.num_hidden_layers=2"
train base base 5e-3 16 $size
for seed in $seeds; do
    train "sft-$seed" sft 5e-3 8 model.init_from=runs/base/model seed="$seed"
    slm pivots target_model="runs/sft-$seed/model" problems=text/search.jsonl out="runs/pivots-$seed" seed="$seed" \
        max_new_tokens=24 batch_size=512 search_samples=16 confirm_samples=32
done
for seed in $seeds; do
    [ -s "arms-$seed.csv" ] || python -W ignore "$here/arms.py" runs "$seed" "arms-$seed.csv"
done
python "$here/collect.py" . "$here"
