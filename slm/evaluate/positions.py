"""Losses by position: what the tokens before a target buy.

The position of a target is the number of tokens that its model sees before it, less one: that in
its window, or with packing=documents in its document. A set has T of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from slm.errors import UserError
from slm.evaluate.losses import CorpusLoss, mean_loss
from slm.store.files import Json
from slm.store.windows import Batch


def check_ends(ends: Sequence[int], seq_lens: Mapping[str, int]) -> None:
    """seq_lens: of the sets; one of them must reach the last end"""
    if any(one >= next_ for one, next_ in pairwise(ends)):
        raise UserError(f"by_position is {list(ends)}, each must be more than the one before")
    if ends and ends[-1] > (longest := max(seq_lens.values(), default=0)):
        name = max(seq_lens, key=seq_lens.__getitem__)
        raise UserError(
            f"by_position is {list(ends)}, but the longest windows, of set {name}, have "
            f"{longest} positions: leave out what is beyond, or prepare it with a larger seq_len"
        )


class Range(NamedTuple):
    """Positions, and the loss there."""

    from_position: int
    to_position: int  # the first that is not in it
    loss: CorpusLoss

    def row(self) -> Json:
        ends = {"from_position": self.from_position, "to_position": self.to_position}
        return ends | self.loss._asdict()


class PositionLosses:
    """Of one model on one set; `window_losses` tells it of every batch."""

    def __init__(self, seq_len: int):
        self.sums = torch.zeros(3, seq_len, dtype=torch.float64)  # nats, targets, bytes

    def add(self, batch: Batch, live: Tensor, sizes: Tensor, loss: Tensor) -> None:
        """live, sizes (bytes of targets), loss: (B, T)"""
        found = torch.stack([loss.cpu().double(), live.double(), sizes.double()])
        if "position_ids" in batch:
            places = batch["position_ids"].flatten()
            self.sums.index_add_(1, places, found.flatten(1))
        else:
            self.sums += found.sum(1)

    def ranges(self, ends: Sequence[int]) -> Iterator[Range]:
        """They end at `ends`, as far as windows reach, and with the window."""
        length = self.sums.shape[1]
        for begin, end in pairwise([0, *(end for end in ends if end < length), length]):
            nats, targets, num_bytes = self.sums[:, begin:end].sum(1).tolist()
            yield Range(begin, end, mean_loss(nats, int(targets), int(num_bytes)))
