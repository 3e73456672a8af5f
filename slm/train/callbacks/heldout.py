"""The held-out losses of a run, while it trains."""

from typing import Any

from lightning import Trainer

from slm.evaluate.command import corpus_loss, num_tokens
from slm.train.callbacks.base import Evaluation, datamodule_of, send


class HeldoutLoss(Evaluation):
    """Logs heldout/<name>/{loss,bits_per_byte} every `every_tokens` tokens, from step 0.

    every_tokens: null for as often as the plan of costs.py allows
    batch_size:   windows of one forward
    """

    def __init__(self, every_tokens: int | None, batch_size: int):
        super().__init__(every_tokens)
        self.batch_size = batch_size

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.heldout_losses = {}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        data = datamodule_of(trainer)
        metrics: dict[str, float] = {}
        for name, corpus in data.heldout.items():
            with trainer.precision_plugin.forward_context():
                result = corpus_loss(pl_module.lm, corpus, self.batch_size, data.heldout_windows)
            pl_module.heldout_losses[name] = metrics[f"heldout/{name}/loss"] = result.loss
            metrics[f"heldout/{name}/bits_per_byte"] = result.bits_per_byte
        send(trainer, metrics)

    def num_tokens(self, trainer: Trainer, windows: int) -> int:
        """Every rank evaluates all of it."""
        sets = datamodule_of(trainer).heldout.values()
        return trainer.world_size * sum(num_tokens(corpus, windows) for corpus in sets)
