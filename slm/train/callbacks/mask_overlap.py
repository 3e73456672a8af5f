"""How much the choice moves while the model learns: masks on a frozen set of windows, compared."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import Tensor

from slm.store.windows import Batch, spread, to_device
from slm.train.callbacks.base import is_due, send, step_ended


class MaskOverlap(Callback):
    """Logs slm/mask_jaccard: the mask on a frozen set of windows against the one before it.

    With weights it is sum of the lower over sum of the higher weight, which is Jaccard's index for
    masks. Evaluated as often as the held-out sets; the last mask is part of the checkpoint.

    num_windows:   of the training corpus, evenly spread
    every_tokens:  null for twenty times in the run
    """

    def __init__(self, num_windows: int, every_tokens: int | None):
        self.num_windows, self.every_tokens = num_windows, every_tokens
        self.before: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:
            self.before = self._weights(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (step_ended(trainer, batch_idx) and is_due(trainer, self.every_tokens, parts=20)):
            return
        now, before = self._weights(trainer, pl_module), self.before
        self.before = now
        if before is not None and (either := torch.maximum(now, before).sum()) > 0:
            send(trainer, {"slm/mask_jaccard": (torch.minimum(now, before).sum() / either).item()})

    @torch.no_grad()
    def _weights(self, trainer: Trainer, pl_module: Any) -> Tensor:  # (W, T) float32, on the CPU
        """In evaluation mode, micro-batch by micro-batch as in training; draws no random number."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        chosen = spread(len(data.windows), self.num_windows)
        size, training = data.micro_batch_size, pl_module.lm.training
        pl_module.lm.eval()
        with trainer.precision_plugin.forward_context():
            parts = [
                probe(pl_module, data.windows.batch(part))
                for part in np.split(chosen, range(size, len(chosen), size))
            ]
        pl_module.lm.train(training)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.before = state_dict["before"]


def probe(pl_module: Any, batch: Batch) -> Tensor:  # (B, T)
    """The weights that the rule in force gives this batch, as in the first pass over the corpus."""
    batch = batch | {"epoch": torch.zeros_like(batch["window"])}
    batch = pl_module.scored(to_device(batch, pl_module.device))
    rule = pl_module.rule()
    if rule.scope == "global":  # every rank has these windows: each would rank copies of them
        rule = replace(rule, scope="batch")
    token_loss = pl_module.lm(batch).loss if rule.needs_token_loss else None
    return rule.choose(batch, token_loss, pl_module.tokens_seen).token_weight.float().cpu()
