"""Losses of one model on one held-out set: of each window, and their mean.

bits per byte = nats summed over the targets / (ln 2 * UTF-8 bytes of those targets). EOS counts its
nats and no bytes. It is the measure that compares tokenizers and select ratios alike.
"""

import math
from typing import NamedTuple

import numpy as np


class CorpusLoss(NamedTuple):
    """Loss of one model on one set."""

    loss: float  # nats per target
    bits_per_byte: float
    num_targets: int
    num_bytes: int


def mean_loss(nats: float, num_targets: int, num_bytes: int) -> CorpusLoss:
    """NaN where there is nothing to divide by."""
    loss = nats / num_targets if num_targets else math.nan
    bits = nats / (math.log(2) * num_bytes) if num_bytes else math.nan
    return CorpusLoss(loss, bits, num_targets, num_bytes)


class WindowLosses(NamedTuple):
    """Loss of one model on each of the windows that it was evaluated on."""

    window: np.ndarray  # (n,) int64, their numbers in the corpus
    nats: np.ndarray  # (n,) float64, summed over the window's targets
    targets: np.ndarray  # (n,) int64, how many
    bytes: np.ndarray  # (n,) int64, UTF-8 bytes of these

    def total(self) -> CorpusLoss:
        return mean_loss(float(self.nats.sum()), int(self.targets.sum()), int(self.bytes.sum()))
