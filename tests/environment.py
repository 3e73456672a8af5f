"""What must stand in the environment before anything else is imported."""

import gc
import os

gc.disable()  # nothing that is imported is garbage: looking for it takes seconds; tests have it on

import torch  # noqa: E402

# Triton's kernels run in its interpreter where there is no GPU; it must know before its import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests of the kernels ask torch for deterministic algorithms, which cuBLAS takes for this alone.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Tests never reach for a network, and two cores are shared by everything.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")
os.environ["WANDB_X_SAVE_REQUIREMENTS"] = "false"  # the list of all packages, for every run
