#!/usr/bin/env bash
# One would guess: what a forked child does at its end leaves its parent's W&B alone. wandb makes one temporary folder
# for media as it is imported and registers its removal with atexit; a child forked after the import, before any run
# has begun, removes it when it ends as a program does (sys.exit), and from then on the parent cannot log an Html, a Table or a figure: FileNotFoundError.
# Scalars still go through. Hurt: whoever imports first and forks its workers with os.fork (pre-forking servers and
# test runners, daemons); multiprocessing's children end by os._exit and remove nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet wandb==0.31.0
cd "$work"
WANDB_SILENT=true "$work/venv/bin/python" - <<'PY'
import os
import sys

import wandb

print("wandb", wandb.__version__)
wandb.Html  # imported, and nothing begun
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)

run = wandb.init(mode="offline", project="p")
run.log({"scalar": 1.0})
try:
    run.log({"after": wandb.Html("<b>2</b>")})
    seen = "logged"
except FileNotFoundError as error:
    seen = type(error).__name__
run.finish()
print("Html after a forked child has ended:", seen)
sys.exit(int(seen != "FileNotFoundError"))
PY
