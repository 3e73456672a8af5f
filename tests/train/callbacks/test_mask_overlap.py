"""The overlap of masks against the masks themselves; resumed runs are compared in test_train."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slm.selection import All, Excess, Random, Selection, Sigmoid
from slm.store.windows import IGNORE_INDEX
from slm.train.callbacks.base import RewindableLogger
from slm.train.callbacks.mask_overlap import MaskOverlap
from slm_kernels import select_top_k

WINDOWS, LENGTH = 6, 5
TARGETS = torch.ones(WINDOWS, LENGTH, dtype=torch.int64)
TARGETS[2, 3] = IGNORE_INDEX
REFERENCE = 3 * torch.rand(WINDOWS, LENGTH, generator=torch.Generator().manual_seed(0))


def losses_at(step: int) -> Tensor:
    return 5 * torch.rand(WINDOWS, LENGTH, generator=torch.Generator().manual_seed(10 + step))


class Log(RewindableLogger):
    name, version = "log", None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


class World:
    """A run of 4 steps in which the model's losses are known beforehand."""

    def __init__(self, rule: Selection):
        self.log, self.modes = Log(), []
        data = SimpleNamespace(windows=self, micro_batch_size=2, tokens_per_step=10)
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            max_steps=4,
            global_rank=0,
            strategy=None,
            world_size=1,
            accumulate_grad_batches=1,
            datamodule=data,
            loggers=[self.log],
            progress_bar_callback=None,
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
        )
        lm: Any = torch.nn.Module()
        lm.forward = self.forward
        self.module: Any = SimpleNamespace(
            lm=lm, device="cpu", rule=lambda: rule, scored=lambda batch: batch, tokens_seen=0
        )

    available = np.arange(WINDOWS)

    def batch(self, windows: np.ndarray) -> dict[str, Tensor]:
        return {
            "targets": TARGETS[windows],
            "reference_logprob": -REFERENCE[windows],
            "window": torch.from_numpy(windows),
        }

    def forward(self, batch: dict[str, Tensor]) -> Any:
        self.modes.append((self.module.lm.training, torch.is_grad_enabled()))
        return SimpleNamespace(loss=losses_at(self.trainer.global_step)[batch["window"]])

    def run(self, callback: MaskOverlap, steps: range) -> list[float]:
        if steps.start == 0:
            callback.on_train_start(self.trainer, self.module)
        for step in steps:
            self.trainer.global_step = step + 1
            callback.on_train_batch_end(self.trainer, self.module, None, None, step)
        return [row["slm/mask_jaccard"] for row in self.log.rows]


def masks(scope: str) -> list[Tensor]:
    """Of every step's losses; micro-batches of two windows are ranked apart."""
    found = []
    for step in range(5):
        excess, live = losses_at(step) - REFERENCE, TARGETS != IGNORE_INDEX
        parts = [slice(i, i + 2) for i in range(0, WINDOWS, 2)]
        found.append(torch.cat([select_top_k(excess[p], live[p], 0.4, scope=scope) for p in parts]))
    return found


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_jaccard_is_that_of_the_masks(scope):
    world, expected = World(Excess(0.4, scope)), []
    for before, now in zip(masks(scope), masks(scope)[1:], strict=False):
        expected.append((before & now).sum().item() / (before | now).sum().item())
    found = world.run(MaskOverlap(WINDOWS, every_tokens=10), range(4))
    assert found == pytest.approx(expected) and len(set(found)) > 1
    assert set(world.modes) == {(False, False)}  # evaluation mode, no graph
    assert world.module.lm.training


def test_weights_have_the_overlap_of_their_sums():
    world = World(Sigmoid(0.7))
    found = world.run(MaskOverlap(WINDOWS, every_tokens=10), range(1))
    live = TARGETS != IGNORE_INDEX
    one, two = (((losses_at(i) - REFERENCE) / 0.7).sigmoid()[live] for i in (0, 1))
    expected = torch.minimum(one, two).sum() / torch.maximum(one, two).sum()
    assert found == pytest.approx([expected.item()])


def test_rules_that_do_not_look_at_the_model_do_not_move():
    for rule in (All(), Random(0.4, seed=0)):
        world = World(rule)
        assert world.run(MaskOverlap(WINDOWS, every_tokens=20), range(4)) == [1.0, 1.0]
        assert not world.modes  # and cost no forward pass


def test_a_continued_run_compares_with_the_mask_before_the_cut():
    whole = World(Excess(0.4)).run(MaskOverlap(WINDOWS, every_tokens=10), range(4))
    first, second = MaskOverlap(WINDOWS, every_tokens=10), MaskOverlap(WINDOWS, every_tokens=10)
    before = World(Excess(0.4)).run(first, range(2))
    second.load_state_dict(first.state_dict())
    assert before + World(Excess(0.4)).run(second, range(2, 4)) == whole
