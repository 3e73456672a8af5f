"""A part of a longer schedule, and the optimizer that a run takes over."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slm.errors import UserError
from slm.train.continued import Continued, TakesOver
from slm.train.optim import warmup_cosine, warmup_stable_decay


@pytest.mark.parametrize(
    "schedule",
    [
        partial(warmup_cosine, warmup_fraction=0.2, final_fraction=0.1),
        partial(warmup_stable_decay, warmup_steps=2, decay_fraction=0.5, final_fraction=0.0),
    ],
)
def test_the_parts_of_a_schedule_are_the_whole(schedule):
    def rates(made: Any, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.5)
        scheduler, found = made(optimizer, steps), []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    parts = [Continued(None, 0, 10), Continued(None, 3, 10), Continued(None, 7, 10)]
    steps = (3, 4, 3)
    found = [rates(p.schedule(schedule), n) for p, n in zip(parts, steps, strict=True)]
    assert sum(found, []) == rates(schedule, 10)


def test_a_run_without_a_checkpoint_leaves_nothing_to_take_over(tmp_path):
    trainer: Any = SimpleNamespace(global_step=0)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/checkpoints holds none, .*schedule=restart"):
        TakesOver(tmp_path).on_train_start(trainer, None)
    trainer.global_step = 3  # a run that goes on has the states of its own checkpoint
    TakesOver(tmp_path).on_train_start(trainer, None)
