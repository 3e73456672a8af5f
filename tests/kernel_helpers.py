"""Where an implementation runs in the tests."""

import sys

import pytest
import torch


def device_of(implementation: str) -> str:
    """Triton runs on the GPU where there is one, else in its interpreter."""
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def forget_known_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked as if the weights were known after the forward pass only, as with a selection."""
    module = sys.modules["slm_kernels.selective_cross_entropy"]  # the function has its name
    monkeypatch.setattr(module, "_is_exact", lambda hidden: False)
