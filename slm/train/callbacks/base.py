"""What callbacks have in common: when a step ended, what is due, where its numbers go."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from torch import Tensor

from slm.console import Progress, new_progress
from slm.train.sharded import data_ranks

TOKENS_SEEN = "data/tokens_seen"


def summed(trainer: Trainer, values: Tensor) -> Tensor:
    """Over all ranks with windows of their own, in place."""
    ranks = data_ranks(trainer)
    if ranks.count == 1:
        return values
    return torch.as_tensor(trainer.strategy.reduce(values, ranks.group, reduce_op="sum"))


class RewindableLogger(Logger):
    """A logger that can forget: a continued run logs again what came after its checkpoint."""

    def truncate_after(self, step: int) -> None: ...


def send(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand metrics of the step that just ended to every logger and to the progress bar."""
    step, data = trainer.global_step, datamodule_of(trainer)
    numbers = {TOKENS_SEEN: step * data.tokens_per_step, **metrics}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step)
    if isinstance(trainer.progress_bar_callback, StepProgress):
        trainer.progress_bar_callback.show(numbers)


def datamodule_of(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in fit()


def step_ended(trainer: Trainer, batch_idx: int) -> bool:
    """True at the last micro-batch of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_due(trainer: Trainer, every_tokens: int | None, parts: int) -> bool:
    """True where the step that just ended crossed a multiple of `every_tokens`, and at the end.

    Without `every_tokens`, `parts` times in the run.
    """
    per_step = datamodule_of(trainer).tokens_per_step
    every = every_tokens or max(1, trainer.max_steps * per_step // parts)
    seen = trainer.global_step * per_step
    return seen // every > (seen - per_step) // every or trainer.global_step == trainer.max_steps


def num_due(trainer: Trainer, every_tokens: int | None, parts: int) -> int:
    """How many of the run's steps are due."""
    per_step = datamodule_of(trainer).tokens_per_step
    total = trainer.max_steps * per_step
    every = max(per_step, every_tokens or total // parts)  # a step is due once
    return total // every + (total // every == (total - per_step) // every)


class Evaluation(Callback):
    """Reads tokens beside the training: before it, every `every_tokens` tokens and at the end.

    every_tokens: null for `parts` times in the run, which callbacks/costs.py lowers for those that
                  are `planned`
    """

    what = "evaluation"  # it reads the tokens for
    planned, parts = True, 20

    def __init__(self, every_tokens: int | None):
        self.every_tokens = every_tokens

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:
            self.evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if step_ended(trainer, batch_idx) and is_due(trainer, self.every_tokens, self.parts):
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        raise NotImplementedError

    def num_tokens(self, trainer: Trainer, windows: int) -> int:
        """What one evaluation puts through the model, on all ranks, with at most so many windows
        of a set."""
        raise NotImplementedError

    def take_at_most(self, windows: int) -> None:
        """Of windows that no other callback has."""

    def times(self, trainer: Trainer, parts: int) -> int:
        """With `parts`, where its interval is not given; the one before the training included."""
        return 1 + num_due(trainer, self.every_tokens, parts)


def summary(metrics: dict[str, float]) -> str:
    """What one line says of the last logged step."""
    formats = {
        "train/loss_all": "loss_all {:.4f}",
        "slm/kept_frac": "kept {:.1%}",
        "perf/tokens_per_s": "{:,.0f} tokens/s",
    }
    return "  ".join(
        form.format(metrics[name]) for name, form in formats.items() if name in metrics
    )


class StepProgress(ProgressBar):
    """Counts optimizer steps: loss of all tokens, kept share, tokens/s, time left."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.text = True, ""
        self.shown: Progress | None = None

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:  # Lightning calls it on all ranks but the first
        self.enabled = False

    def show(self, metrics: dict[str, float]) -> None:
        """Take over the numbers of the step that just ended."""
        self.text = summary(metrics) or self.text

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.enabled:
            self.shown = new_progress("train", trainer.max_steps, done=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.shown is not None and step_ended(trainer, batch_idx):
            self.shown(1, self.text)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.shown is not None:
            self.shown.end()
            self.shown = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
