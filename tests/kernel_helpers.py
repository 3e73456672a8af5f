"""Where an implementation runs in the tests."""

import torch


def device_of(implementation: str) -> str:
    """Triton runs on the GPU where there is one, else in its interpreter."""
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
