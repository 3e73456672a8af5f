"""Runs of `slm train` on several ranks in shards, and in one process; how their results compare."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import warm
from run_helpers import TINY_MODEL
from slm.train.checkpoint import remove_checkpoint, step_of
from train_helpers import rows

RANKS = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
OF_ONE_RANK = ("slm/threshold", "slm/kept_frac/test", "slm/weight_mean/test")
OF_A_FORWARD = ("slm/mask_jaccard",)  # which has fewer windows, if not of one window each
NEW = [*TINY_MODEL, "model.architecture.num_hidden_layers=2"]
TRAIN = [sys.executable, "-m", "slm.train"]


def words(out: Path, corpus: Any, *more: str) -> list[str]:
    """6 steps of 8 windows; forwards of 4 windows over all ranks, whose number does not matter."""
    return [
        *(f"out='{out}'", f"data.corpus='{corpus.folder}'", "max_tokens=768"),
        *(f"data.heldout={{held: '{corpus.folder}'}}", "data.heldout_windows=7"),
        *("data.batch_size=8", "selection=loss", "logger=csv"),
        *("callbacks.heldout.every_tokens=256", "callbacks.metrics.every_steps=1"),
        *("callbacks.heldout.batch_size=2", "callbacks.mask_overlap.num_windows=6"),
        "data.num_workers=0",
        *(() if "model.init_from" in " ".join(more) else NEW),
        *more,
    ]


def on_ranks(ranks: int, line: Sequence[str], tensor_parallel: int = 1) -> str:
    micro = f"data.micro_batch_size={4 * tensor_parallel // ranks}"
    more = shape_of(ranks, tensor_parallel)
    codes, said = warm.run_ranks(ranks, [*TRAIN, micro, *line, *more])
    assert codes == [0] * ranks, said
    return said


def in_one(line: Sequence[str]) -> None:
    warm.run([*TRAIN, "data.micro_batch_size=4", *line], check=True)


def same(one: Path, other: Path, but: Sequence[str] = OF_ONE_RANK) -> None:
    """Weights and logs, but for the rounding of sums in another order."""
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-6, name
    for log in ("train.csv", "heldout.csv", "heldout_windows.csv"):
        for left, right in zip(rows(one / log), rows(other / log), strict=True):
            assert left.keys() == right.keys()
            for key in left.keys() - {"set"}:
                if left[key] and not ("_p" in key or key in but):
                    assert float(left[key]) == pytest.approx(float(right[key]), rel=1e-6), key


def shape_of(ranks: int, tensor_parallel: int) -> list[str]:
    size = f"trainer.strategy.tensor_parallel_size={tensor_parallel}"
    return [*RANKS, f"trainer.devices={ranks}", size]


def refused(ranks: int, line: Sequence[str], tensor_parallel: int = 1) -> str:
    codes, said = warm.run_ranks(ranks, [*TRAIN, *line, *shape_of(ranks, tensor_parallel)])
    assert codes == [1] * ranks, said
    sentences = [text for text in said.splitlines() if text.startswith("slm train: ")]
    assert len(sentences) == 1 and "Traceback" not in said, said
    return sentences[0]


KEPT = (
    "data.micro_batch_size=1",
    "callbacks.checkpoints.every_tokens=256",
    "callbacks.checkpoints.keep=null",
)


def cut(run: Path, to: Path, step: int = 2) -> Path:
    """The run as it was when it was killed after a step."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("run.claim"))
    shutil.rmtree(to / "model")
    for name in ("lineage.json", "tables.json"):
        (to / name).unlink()
    for path in (to / "checkpoints").glob("step-*.ckpt"):
        if step_of(path) > step:
            remove_checkpoint(path)
    return to
