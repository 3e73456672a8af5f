"""A run whose schedule is a part of a longer one: a stage of several (stages.py).

It goes on with the optimizer's states of the run before, as one run over all of them would.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Callback, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from slm.errors import UserError
from slm.train.checkpoint import newest_checkpoint, read_checkpoint
from slm.train.extend import factor

log = logging.getLogger("slm.train")


class Continued(NamedTuple):
    """Where in the longer schedule the run lies."""

    run: Path | None  # whose optimizer it takes over; None: it is the first part
    steps_before: int
    total_steps: int

    def identity(self) -> dict[str, int]:
        """Of run.json; the run before is known by its model, which this one begins with."""
        return {
            "stage.steps_before": self.steps_before,
            "stage.total_steps": self.total_steps,
        }

    def schedule(
        self, whole: Callable[[Optimizer, int], LRScheduler]
    ) -> Callable[[Optimizer, int], LRScheduler]:
        """The part of `whole` that the run has."""

        def part(optimizer: Optimizer, num_steps: int) -> LambdaLR:
            rate = factor(whole, self.total_steps)
            return LambdaLR(optimizer, lambda step: rate(self.steps_before + step))

        return part


class TakesOver(Callback):
    """Before the first step, the states of the optimizer that ended the run before."""

    def __init__(self, run: Path):
        self.run = run

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step > 0:  # its own checkpoint has them
            return
        path = newest_checkpoint(self.run / "checkpoints", log.warning)
        if path is None:
            raise UserError(
                f"{self.run}/checkpoints holds none, and the stage after it goes on with its "
                "optimizer (schedule=through): schedule=restart"
            )
        (optimizer,) = trainer.optimizers
        (before,) = read_checkpoint(path)["optimizer_states"]
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": before["state"], "param_groups": groups})
