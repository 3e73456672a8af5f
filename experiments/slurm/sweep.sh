#!/usr/bin/env bash
# A sweep whose runs are jobs of a Slurm array; it stays until they have ended, and prints their table. Run it in tmux on
# the login node; the same command again tries what failed and skips what is finished.
#
#     experiments/slurm/sweep.sh data.corpus=corpus/train data.references=references/a max_tokens=2_000_000 out=runs/k
set -euo pipefail
exec slm train -m experiment=sweep_k hydra/launcher=slurm hydra.launcher.gpus_per_node="${GPUS:-1}" "$@"
