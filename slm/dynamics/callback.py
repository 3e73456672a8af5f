"""Token dynamics while a run trains: the callback of `slm train callbacks=dynamics`.

Costs one forward pass over the token set each time.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from slm.command_keys import PRECISIONS
from slm.dynamics.analysis import run_chooser
from slm.dynamics.classes import MIN_CHECKPOINTS, RunningFit
from slm.dynamics.stores import (
    classify_run,
    draw,
    run_record,
    store_folder,
    warn_of_training_text,
)
from slm.dynamics.trajectories import TrajectoryStore, make_plan, remove_store, token_losses
from slm.dynamics.wandb_media import dynamics_metrics, excess_histograms, final_media, final_summary
from slm.errors import NonFiniteError
from slm.model.architecture import check_length
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer
from slm.store.windows import open_windows
from slm.train.callbacks.base import Evaluation, is_due, num_due, send
from slm.train.loggers import WandbLog
from slm.train.sharded import data_ranks

log = logging.getLogger("slm.dynamics")
PARTS = 32  # of a run: how often the callback looks


class TokenDynamics(Evaluation):
    """Token losses every `every_tokens` tokens, from step 0, into <run_dir>/dynamics/<name>.

    Logs dynamics/*: the mean loss, and from the third time on the classes as far as they are known
    by then, their losses and what the rule in force keeps of them. At the end the classes are
    made anew from all checkpoints. It draws no random number and reads no training sample.

    every_tokens: null for about 32 times in the run, in whole steps
    batch_size:   windows of one forward
    """

    what = "token dynamics"
    planned, parts = False, PARTS  # the fit of a token's line wants its checkpoints

    def __init__(
        self,
        run_dir: str,
        name: str,
        corpus: str,
        references: str | Sequence[str] | Mapping[str, str] | None,
        combine: str | None,
        num_targets: int,
        seed: int,
        by_source: bool,
        every_tokens: int | None,
        batch_size: int,
        threshold: float,
        mean_loss: float | None,
    ):
        self.run_dir = Path(run_dir)
        self.folder = store_folder(self.run_dir, name, "callbacks.dynamics.")
        prefix = "callbacks.dynamics."
        self.windows = open_windows(Corpus.open(corpus), references, combine, prefix=prefix)
        self.tokens = draw(self.windows, num_targets, seed, by_source)
        super().__init__(every_tokens)
        self.batch_size = batch_size
        self.threshold, self.mean_loss = threshold, mean_loss

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        training: Corpus = trainer.datamodule.corpus  # type: ignore[attr-defined]
        mine = self.windows.corpus
        check_same_tokenizer(mine.folder, mine, f"the training corpus {training.folder}", training)
        check_length(pl_module.lm.model.config, self.windows.corpus.seq_len)
        self.every_tokens = self.every_tokens or even_part(trainer)
        has_it = False
        if trainer.is_global_zero:
            self._warn(trainer, training.fingerprint)
            self.store = self._open(
                trainer.global_step == 0, pl_module.tokens_seen, PRECISIONS[str(trainer.precision)]
            )
            has_it = self.store.has(pl_module.tokens_seen)
        starts = trainer.global_step == 0 or is_due(trainer, self.every_tokens, self.parts)
        if starts and not trainer.strategy.broadcast(has_it):
            self.evaluate(trainer, pl_module)

    def _warn(self, trainer: Trainer, fingerprint: str) -> None:
        """Of what would be noticed when it is too late."""
        warn_of_training_text(self.windows.corpus, fingerprint)
        every, total = self.every_tokens or 1, tokens_of(trainer)
        if total // every + 1 < MIN_CHECKPOINTS:
            log.warning(
                "callbacks.dynamics.every_tokens is %d in a run of %d tokens: fewer than %d times, "
                "so there will be no classes",
                *(every, total, MIN_CHECKPOINTS),
            )

    def _open(self, is_new: bool, tokens_seen: int, precision: str) -> TrajectoryStore:
        """A run that starts anew has no trajectories; one that goes on forgets what came later."""
        if is_new:
            remove_store(self.folder)
        plan = make_plan(self.windows, self.tokens.windows, run_record(self.run_dir), precision)
        store = TrajectoryStore.create(self.folder, plan, self.tokens)
        store.forget_after(tokens_seen)
        self.fit = RunningFit(self.threshold, self.mean_loss)
        self.chooser = run_chooser(store, warns=True)
        for column in store.losses():
            self.fit.add(column)
        return store

    def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        losses = self._losses(trainer, pl_module)
        if not np.isfinite(losses).all():
            raise NonFiniteError(
                f"step {trainer.global_step}: the loss of {np.sum(~np.isfinite(losses))} of the "
                f"{len(losses)} tokens in {self.folder} is not finite"
            )
        if trainer.is_global_zero:
            self.store.append(pl_module.tokens_seen, losses)
            self.fit.add(losses)
            self._log(trainer, losses, pl_module.tokens_seen)
            if trainer.global_step == trainer.max_steps:
                self._finish(trainer, pl_module.tokens_seen)

    def num_tokens(self, trainer: Trainer, windows: int) -> int:
        """Its own windows, which the ranks share out."""
        return len(self.tokens.windows) * self.windows.corpus.seq_len

    def times(self, trainer: Trainer, parts: int) -> int:
        return 1 + num_due(trainer, self.every_tokens or even_part(trainer), self.parts)

    def _log(self, trainer: Trainer, losses: np.ndarray, seen: int) -> None:
        label = self.fit.labels() if self.fit.is_ready else None
        selected = None if self.chooser is None else self.chooser.selected(losses, seen)
        send(trainer, dynamics_metrics(losses, label, selected))
        if "reference_loss" in self.tokens.columns:
            excess_loss = losses - self.tokens.columns["reference_loss"]
            histograms = excess_histograms(excess_loss, selected)
            for logger in wandb_logs(trainer):
                logger.log_media(histograms, trainer.global_step, seen)

    def _losses(self, trainer: Trainer, pl_module: Any) -> np.ndarray:  # (M,)
        """Every rank computes its part of the windows, as many forwards as the others."""
        numbers, ranks = self.tokens.windows, data_ranks(trainer)
        per_rank = -(-len(numbers) // ranks.count)
        places = np.arange(per_rank) + per_rank * ranks.rank
        mine = numbers[np.minimum(places, len(numbers) - 1)]
        with trainer.precision_plugin.forward_context():
            found = token_losses(pl_module.lm, self.windows, mine, self.batch_size)
        mine_of = torch.from_numpy(found).to(pl_module.device)
        gathered = pl_module.all_gather(mine_of, ranks.group)
        grid = gathered.reshape(-1, found.shape[1])[: len(numbers)].cpu().numpy()
        return grid[self.tokens.live]

    def _finish(self, trainer: Trainer, seen: int) -> None:
        """At the last step and before its checkpoint, so that a run killed here does it again."""
        if not self.fit.is_ready:
            return
        name, manifest = self.run_dir.name, self.store.folder / "manifest.json"
        analysis = classify_run(self.store, name, self.threshold, self.mean_loss)
        for logger in wandb_logs(trainer):
            logger.log_media(final_media(analysis), trainer.global_step, seen)
            logger.log_summary(final_summary(analysis))
            logger.log_folder(manifest, name=f"dynamics-{name}", kind="dynamics", is_input=False)


def wandb_logs(trainer: Trainer) -> list[WandbLog]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLog)]


def even_part(trainer: Trainer) -> int:
    """Tokens of whole steps, about 1/32 of the run: the fit takes the checkpoints as even."""
    return max(1, round(trainer.max_steps / PARTS)) * (tokens_of(trainer) // trainer.max_steps)


def tokens_of(trainer: Trainer) -> int:
    """Of the whole run."""
    return trainer.max_steps * trainer.datamodule.tokens_per_step  # type: ignore[attr-defined]
