"""Runs of `slm train` on a corpus of no size, whole or cut, and how their results compare."""

import csv
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file

from run_helpers import TINY_MODEL, composed, train
from slm.train import build as building

TINY = [
    *TINY_MODEL,
    "+model.architecture.attention_dropout=0.2",
    "logger=csv",
    "callbacks.metrics.every_steps=1",
]


def compose_train(out: Path, corpus: Path, *overrides: str) -> Any:
    """40 windows of 16: a pass is 5 steps of 8 windows; 12 steps are more than two passes."""
    words = [
        f"out='{out}'",
        f"run_dir='{out}'",
        f"data.corpus='{corpus}'",
        f"data.heldout={{held: '{corpus}'}}",
        "data.heldout_windows=6",
        "data.batch_size=8",
        "data.micro_batch_size=4",
        f"max_tokens={12 * 8 * 16}",
        "selection=random",
        "optimizer.adamw.lr=0.01",
        "callbacks.heldout.every_tokens=384",
        "callbacks.checkpoints.every_tokens=256",
        "callbacks.checkpoints.best_of=held",
        *TINY,
        *overrides,
    ]
    return composed("train", *words)


class Crash(Callback):
    """Raises after optimizer step `step`, once its checkpoint is written."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


class Copy(Callback):
    """Beside a run, <step> is as a process that is killed after optimizer step `step` leaves it."""

    def __init__(self, run: Path, steps: Sequence[int]):
        self.run, self.steps = run, steps

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        copy = self.run.parent / str(trainer.global_step)
        if trainer.global_step in self.steps and not copy.exists():
            shutil.copytree(self.run, copy, ignore=shutil.ignore_patterns("run.claim"))


def train_with_copies(config: Any, steps: Sequence[int]) -> None:
    """A whole run, and beside it a copy of its folder after each of these steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "StepProgress", lambda: Copy(Path(config.run_dir), steps))
        train(config)


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    """Hand the trainer a bar that crashes: the last of all callbacks."""
    bar = Callback() if step is None else Crash(step)
    monkeypatch.setattr(building, "StepProgress", lambda: bar)


def rows(path: Path) -> list[dict[str, str]]:
    """A log without what measures time or memory."""
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in found]


def same_results(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for log in ("train.csv", "heldout.csv"):
        assert rows(one / log) == rows(other / log)


def command(out: Path, corpus: Path, *overrides: str) -> list[str]:
    words = [
        f"out='{out}'",
        f"data.corpus='{corpus}'",
        f"data.heldout={{held: '{corpus}'}}",
        "data.heldout_windows=2",
        "data.batch_size=8",
        "data.micro_batch_size=4",
        "selection=random",
        "optimizer.adamw.lr=0.01",
        "callbacks.checkpoints.every_tokens=2560",
        *TINY,
    ]
    return [sys.executable, "-m", "slm.train", *words, *overrides]


TWO_RANKS = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
