"""Configurations of token dynamics, during training and afterwards; a model of no size."""

from pathlib import Path
from typing import Any

import torch

from run_helpers import composed
from slm.cli import plain_settings
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM

SETTINGS = ["num_targets=100", "name=c"]


def compose_dynamics(runs: Path, corpus: Path, *overrides: str) -> Any:
    words = [f"runs='{runs}'", f"corpus='{corpus}'", *SETTINGS, *overrides]
    return plain_settings(composed("dynamics", *words))


def during(corpus: Any, *overrides: str) -> list[str]:
    return [
        "callbacks=dynamics",
        f"callbacks.dynamics.corpus='{corpus.folder}'",
        "callbacks.dynamics.num_targets=100",
        "callbacks.dynamics.every_tokens=256",
        *overrides,
    ]


def make_lm() -> SelectiveLM:
    torch.manual_seed(0)
    fields = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attention_dropout": 0.5,
    }
    return SelectiveLM(new_model(fields, 300, None)).train()
