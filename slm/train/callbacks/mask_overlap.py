"""How much the choice moves while the model learns: masks on a frozen set of windows, compared."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from slm.selection.rule import ENTROPY
from slm.store.windows import Batch, spread, to_device, turns
from slm.train.callbacks.base import Evaluation, datamodule_of, send, summed
from slm.train.sharded import data_ranks


class MaskOverlap(Evaluation):
    """Logs slm/mask_jaccard: the mask on a frozen set of windows against the one before it.

    With weights it is sum of the lower over sum of the higher weight, which is Jaccard's index for
    masks. Evaluated as often as the held-out sets; the last mask is part of the checkpoint.

    num_windows:   of the training corpus, evenly spread
    every_tokens:  null for as often as the plan of costs.py allows
    """

    what = "mask overlap"

    def __init__(self, num_windows: int, every_tokens: int | None):
        super().__init__(every_tokens)
        self.num_windows = num_windows
        self.before: Tensor | None = None

    def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        now, before = self._weights(trainer, pl_module), self.before
        self.before = now
        if before is not None and (either := torch.maximum(now, before).sum()) > 0:
            send(trainer, {"slm/mask_jaccard": (torch.minimum(now, before).sum() / either).item()})

    def num_tokens(self, trainer: Trainer, windows: int) -> int:
        """The ranks share them out; rules that need no loss of the model read none."""
        data = datamodule_of(trainer)
        chosen = min(self.num_windows, windows, len(data.windows.available))
        return chosen * data.corpus.seq_len

    def take_at_most(self, windows: int) -> None:
        self.num_windows = min(self.num_windows, windows)

    @torch.no_grad()
    def _weights(self, trainer: Trainer, pl_module: Any) -> Tensor:  # (W, T) float32, on the CPU
        """In evaluation mode, micro-batch by micro-batch as in training; draws no random number.

        Each rank has every so many-th, and all of them the sum.
        """
        data, ranks = datamodule_of(trainer), data_ranks(trainer)
        available = data.windows.available
        chosen = available[spread(len(available), self.num_windows)]
        size, training = data.micro_batch_size, pl_module.lm.training
        pl_module.lm.eval()
        parts = np.split(chosen, range(size, len(chosen), size))
        found: dict[int, Tensor] = {}
        with trainer.precision_plugin.forward_context():
            for turn in turns(len(parts), ranks.rank, ranks.count):
                batch = data.windows.batch(parts[min(turn, len(parts) - 1)])
                found[turn] = probe(pl_module, batch)
        pl_module.lm.train(training)
        weights = torch.zeros(len(chosen), found[ranks.rank].shape[1])
        for turn in range(ranks.rank, len(parts), ranks.count):
            weights[turn * size :][: len(parts[turn])] = found[turn]
        return summed(trainer, weights.to(pl_module.device)).cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.before = state_dict["before"]


def probe(pl_module: Any, batch: Batch) -> Tensor:  # (B, T)
    """The weights that the rule in force gives this batch, as in the first pass over the corpus."""
    batch = batch | {"epoch": torch.zeros_like(batch["window"])}
    batch = pl_module.scored(to_device(batch, pl_module.device))
    rule = pl_module.rule()
    if rule.scope == "global":  # ranked alike, whatever the number of ranks
        rule = replace(rule, scope="batch")
    token_loss = None
    if rule.needs_entropy:
        output = pl_module.lm(batch, want_entropy=True)
        token_loss, batch = output.loss, batch | {ENTROPY: output.entropy}
    elif rule.needs_token_loss:
        token_loss = pl_module.lm(batch).loss
    return rule.choose(batch, token_loss, pl_module.tokens_seen).token_weight.float().cpu()
