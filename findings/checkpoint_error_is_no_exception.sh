#!/usr/bin/env bash
# One would guess that `except Exception` around torch.distributed.checkpoint's save and load sees what fails there: a full disk, a
# file that is missing. What they raise is CheckpointException, which derives from BaseException, with KeyboardInterrupt and
# SystemExit: it passes by `except Exception`, and by whatever rests on it (retries, cleaning up, a trainer's on_exception hooks
# that ask for an Exception). In one process without torch.distributed it is the same. Who is hurt: whoever goes on after a failed
# save, or looks for the newest checkpoint that loads. The cause is in its `failures`, by rank.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.5
cd "$folder"
env/bin/python -W ignore - <<'PY'
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

print("torch", torch.__version__)
dcp.save({"weight": torch.ones(4)}, checkpoint_id="checkpoint")
for name in Path("checkpoint").glob("*.distcp"):
    name.unlink()  # as a copy that was interrupted leaves it
seen = []
try:
    try:
        dcp.load({"weight": torch.zeros(4)}, checkpoint_id="checkpoint")
    except Exception as error:
        seen.append(f"except Exception saw {type(error).__name__}")
except BaseException as error:
    causes = [type(failure[0]).__name__ for failure in error.failures.values()]
    seen.append(f"except Exception did not see {type(error).__name__}, a {type(error).__mro__[1].__name__}, of {causes}")
print(*seen, sep="\n")
raise SystemExit(seen != ["except Exception did not see CheckpointException, a BaseException, of ['FileNotFoundError']"])
PY
