"""The held-out losses of a run, while it trains."""

from typing import Any

from lightning import Callback, Trainer

from slm.evaluate.command import corpus_loss
from slm.train.callbacks.base import is_due, send, step_ended


class HeldoutLoss(Callback):
    """Logs heldout/<name>/{loss,bits_per_byte} every `every_tokens` tokens, from step 0.

    every_tokens: null for twenty times in the run
    batch_size:   windows of one forward
    """

    def __init__(self, every_tokens: int | None, batch_size: int):
        self.every_tokens, self.batch_size = every_tokens, batch_size

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.heldout_losses = {}
        if step_ended(trainer, batch_idx) and is_due(trainer, self.every_tokens, parts=20):
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        metrics: dict[str, float] = {}
        for name, corpus in data.heldout.items():
            with trainer.precision_plugin.forward_context():
                result = corpus_loss(pl_module.lm, corpus, self.batch_size, data.heldout_windows)
            pl_module.heldout_losses[name] = metrics[f"heldout/{name}/loss"] = result.loss
            metrics[f"heldout/{name}/bits_per_byte"] = result.bits_per_byte
        send(trainer, metrics)
