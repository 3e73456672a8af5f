#!/usr/bin/env bash
# The whole pipeline, a command a stage, in a new folder: bash experiments/quickstart.sh [FOLDER]
# Its text is what every Python brings: docstrings and the language reference (curated), and the source
# of the standard library (raw). Two or three minutes on two cores, nothing is downloaded. The budgets
# are too small to say anything of selection; `slm demo` trains longer, with two seeds.
set -euo pipefail
mkdir -p "${1:-quickstart}"
cd "${1:-quickstart}"
python -c "from slm.demo import write_texts; write_texts('text')"

# Corpora of one tokenizer: raw and curated text, and documents of modules that neither has seen.
# A tenth of the documents, for time.
slm prepare out=corpus 'sources=[{path: text/raw.jsonl, weight: 0.1}]' tokenizer.vocab_size=2048 seq_len=128 \
    heldout_ratio=0
slm prepare out=curated 'sources=[{path: text/curated.jsonl, weight: 0.1}]' \
    tokenizer.path=corpus/train/tokenizer seq_len=128 heldout_ratio=0
slm prepare out=unseen 'sources=[{path: text/heldout.jsonl, weight: 0.2}]' tokenizer.path=corpus/train/tokenizer seq_len=128 \
    heldout_ratio=1

# A base on raw text; the reference, which is the base tuned on curated text; its scores of the corpus.
slm train out=runs/base data.corpus=corpus/train selection=all max_tokens=100_000
slm train out=runs/reference data.corpus=curated/train selection=all model.init_from=runs/base/model \
    max_tokens=50_000 'data.heldout={unseen: unseen/heldout}' data.heldout_windows=32
slm score out=references corpus=corpus/train reference_model=runs/reference/model
slm score out=unseen_references corpus=unseen/heldout reference_model=runs/reference/model

# The target, which trains on the 60% of highest excess loss, beside its two controls.
slm train -m out=runs/targets selection=all,random,excess data.corpus=corpus/train \
    data.references=references model.init_from=runs/base/model max_tokens=50_000 \
    'data.heldout={unseen: unseen/heldout}' data.heldout_windows=32 callbacks=dynamics \
    callbacks.dynamics.corpus=unseen/heldout callbacks.dynamics.references=unseen_references \
    callbacks.dynamics.num_targets=4_000

# What came of it: losses, token dynamics, one page.
slm evaluate 'models={base: runs/base/model, reference: runs/reference/model}' \
    'sets={unseen: unseen/heldout}' out=losses.csv
slm report runs=runs/targets out=report 'baselines={reference model: runs/reference}'
slm verify corpus curated unseen references runs
