"""Which implementation runs, and whether it can."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
NAMES = ("reference", "chunked", "triton")


def pick_implementation(name: str, hidden: Tensor) -> str:
    """Resolve "auto". ValueError for an unknown name, or for triton where it cannot run."""
    if name == "auto":
        can = hidden.device.type == "cuda" and _why_no_triton(hidden) is None
        return "triton" if can else "chunked"
    if name not in NAMES:
        choices = ", ".join(("auto", *NAMES))
        raise ValueError(f"implementation must be one of {choices}, got {name!r}")
    reason = _why_no_triton(hidden) if name == "triton" else None
    if reason is not None:
        raise ValueError(f"implementation 'triton' cannot run here: {reason}")
    return name


def _why_no_triton(hidden: Tensor) -> str | None:
    if not HAS_TRITON:
        return "the package triton is not installed"
    if hidden.dtype == torch.float64:
        return "hidden is torch.float64, its kernels compute in torch.float32"
    if hidden.device.type != "cuda" and not _interprets():
        return f"hidden is on {hidden.device}, it needs a CUDA device"
    if hidden.device.type == "cuda" and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        found = torch.cuda.get_device_capability(hidden.device)
        return f"the device has compute capability {found}, it needs (8, 0)"
    return None


def _interprets() -> bool:
    """TRITON_INTERPRET=1: for tests on a machine without a GPU; thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
