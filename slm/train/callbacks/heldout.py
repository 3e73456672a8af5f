"""The held-out losses of a run, while it trains."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from slm.evaluate.command import num_tokens, window_losses
from slm.evaluate.losses import WindowLosses
from slm.store.shards import Corpus
from slm.store.windows import spread
from slm.train.callbacks.base import Evaluation, datamodule_of, send, summed
from slm.train.curves import write_window_losses
from slm.train.sharded import data_ranks


class HeldoutLoss(Evaluation):
    """Logs heldout/<name>/{loss,bits_per_byte} every `every_tokens` tokens, from step 0.

    Those of every window, before training and at the latest, are in `run_dir`/heldout_windows.csv.

    every_tokens: null for as often as the plan of costs.py allows
    batch_size:   windows of one forward
    """

    what = "held-out sets"

    def __init__(self, run_dir: str, every_tokens: int | None, batch_size: int):
        super().__init__(every_tokens)
        self.run_dir, self.batch_size = Path(run_dir), batch_size

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.heldout_losses = {}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        data = datamodule_of(trainer)
        metrics: dict[str, float] = {}
        windows: dict[str, WindowLosses] = {}
        for name, corpus in self.sets(trainer).items():
            with trainer.precision_plugin.forward_context():
                found = window_losses(
                    *(pl_module.lm, corpus, self.batch_size, data.heldout_windows),
                    rank=data_ranks(trainer).rank,
                    ranks=data_ranks(trainer).count,
                    watch=partial(self.watch, name),
                )
            windows[name] = found = self._together(trainer, pl_module, corpus, found)
            result = found.total()
            pl_module.heldout_losses[name] = metrics[f"heldout/{name}/loss"] = result.loss
            metrics[f"heldout/{name}/bits_per_byte"] = result.bits_per_byte
        send(trainer, metrics)
        if trainer.is_global_zero:
            seen = trainer.global_step * data.tokens_per_step
            write_window_losses(self.run_dir, seen, windows)

    def sets(self, trainer: Trainer) -> dict[str, Corpus]:
        """Those that are read now."""
        return datamodule_of(trainer).heldout

    def watch(self, name: str, token_loss: Tensor) -> None:
        """The losses (B, T) of one batch of a set: for those who keep them."""

    def _together(
        self, trainer: Trainer, pl_module: Any, corpus: Corpus, mine: WindowLosses
    ) -> WindowLosses:
        """The losses of all ranks' windows, as one process has them: all others add a zero."""
        if data_ranks(trainer).count == 1:
            return mine
        chosen = spread(corpus.num_windows, datamodule_of(trainer).heldout_windows)
        grid = np.zeros((3, len(chosen)))
        grid[:, np.searchsorted(chosen, mine.window)] = mine.nats, mine.targets, mine.bytes
        grid = summed(trainer, torch.from_numpy(grid).to(pl_module.device)).cpu().numpy()
        return WindowLosses(chosen, grid[0], *grid[1:].astype(np.int64))

    def num_tokens(self, trainer: Trainer, windows: int) -> int:
        """The ranks share them out."""
        return sum(
            num_tokens(corpus, windows) for corpus in datamodule_of(trainer).heldout.values()
        )
