"""The four kinds of tokens: H->H, L->H, H->L, L->L, from their losses over checkpoints.

Rho-1, appendix D.1: a least-squares line through the losses l_0 ... l_n of a token over the
checkpoints' indices 0 ... n, and its change from end to end,

    delta < -threshold            H->L   learned
    delta >  threshold            L->H   forgotten
    else l_n <= mean_loss         L->L   easy from the start
    else                          H->H   not learned

where mean_loss is the mean of the last checkpoint's losses over all tokens. "H->L" is decided by
the change alone, not by the level. Costs one pass over the losses; memory is a few numbers a token
of one block.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm.errors import UserError

CLASSES = ("HH", "LH", "HL", "LL")
ARROWS = {"HH": "H\u2192H", "LH": "L\u2192H", "HL": "H\u2192L", "LL": "L\u2192L"}
THRESHOLD = 0.2  # nats, the paper's
BLOCK = 16_384  # tokens at a time: with 1,000 checkpoints 130 MB
MIN_CHECKPOINTS = 3


class Trajectories(NamedTuple):
    """Per token, over all checkpoints; nats."""

    start: np.ndarray  # (M,) the line at the first checkpoint
    end: np.ndarray  # (M,) and at the last
    last: np.ndarray  # (M,) loss at the last checkpoint
    variance: np.ndarray  # (M,) around the line
    crossings: np.ndarray  # (M,) int32: how often the loss passes mean_loss
    first_below: np.ndarray  # (M,) int32: first checkpoint at or below mean_loss; -1: none
    label: np.ndarray  # (M,) uint8: index into CLASSES

    @property
    def delta(self) -> np.ndarray:  # (M,)
        return self.end - self.start


def classify(
    losses: Sequence[np.ndarray],  # C arrays (M,), one a checkpoint, in order
    threshold: float = THRESHOLD,
    mean_loss: float | None = None,
) -> Trajectories:
    """Fit, count and label every token; `mean_loss`: None takes the last checkpoint's."""
    check_losses(losses)
    level = float(np.mean(losses[-1], dtype=np.float64)) if mean_loss is None else mean_loss
    parts = [fit_block(block, threshold, level) for block in blocks(losses)]
    return Trajectories(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def check_threshold(threshold: Any, mean_loss: Any) -> None:
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise UserError(f"threshold is {threshold!r}, it must be a number of nats, 0 or more")
    if mean_loss is not None and not isinstance(mean_loss, int | float):
        raise UserError(f"mean_loss is {mean_loss!r}, it must be a number of nats, or null")


def check_losses(losses: Sequence[np.ndarray]) -> None:
    if len(losses) < MIN_CHECKPOINTS:
        raise UserError(
            f"{len(losses)} checkpoints have token losses, a trajectory needs {MIN_CHECKPOINTS}"
        )
    sizes = {len(column) for column in losses}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"the checkpoints have losses of {sorted(sizes)} tokens, one number > 0")


def blocks(losses: Sequence[np.ndarray]) -> Iterator[np.ndarray]:  # (C, m) float64
    for start in range(0, len(losses[0]), BLOCK):
        block = np.stack([column[start : start + BLOCK] for column in losses]).astype(np.float64)
        if not np.isfinite(block).all():
            checkpoint, token = np.argwhere(~np.isfinite(block))[0]
            raise UserError(
                f"checkpoint {checkpoint} has loss {block[checkpoint, token]} at token "
                f"{start + token}, finite numbers are needed"
            )
        yield block


def fit_block(block: np.ndarray, threshold: float, level: float) -> Trajectories:
    """Of one block (C, m): every token's line by its closed form."""
    x = np.arange(len(block)) - (len(block) - 1) / 2  # centred: slope and mean do not mix
    slope, mean = x @ block / (x @ x), block.mean(0)
    start, end = mean + slope * x[0], mean + slope * x[-1]
    below = block <= level
    first = np.where(below.any(0), below.argmax(0), -1)
    return Trajectories(
        start=start,
        end=end,
        last=block[-1],
        variance=variance(block, mean, slope, x),
        crossings=np.count_nonzero(below[1:] != below[:-1], axis=0).astype(np.int32),
        first_below=first.astype(np.int32),
        label=labels(end - start, block[-1], threshold, level),
    )


def variance(block: np.ndarray, mean: np.ndarray, slope: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mean squared distance from the line, (m,), one checkpoint at a time to save memory."""
    total = np.zeros_like(mean)
    for row, place in zip(block, x, strict=True):
        total += (row - mean - slope * place) ** 2
    return total / len(block)


def labels(delta: np.ndarray, last: np.ndarray, threshold: float, level: float) -> np.ndarray:
    """(m,) uint8: the paper's rule, in its order."""
    level_class = np.where(last <= level, CLASSES.index("LL"), CLASSES.index("HH"))
    rising = np.where(delta > threshold, CLASSES.index("LH"), level_class)
    return np.where(delta < -threshold, CLASSES.index("HL"), rising).astype(np.uint8)


class RunningFit:
    """The same labels after each of a growing number of checkpoints, in two sums a token."""

    def __init__(self, threshold: float = THRESHOLD, mean_loss: float | None = None):
        self.threshold, self.mean_loss = threshold, mean_loss
        self.count = 0

    @property
    def is_ready(self) -> bool:
        return self.count >= MIN_CHECKPOINTS

    def add(self, losses: np.ndarray) -> None:  # (M,) nats
        if self.count == 0:
            self.total, self.moment = np.zeros(len(losses)), np.zeros(len(losses))
        self.last = np.asarray(losses, np.float64)
        self.total += self.last
        self.moment += self.count * self.last
        self.count += 1

    def labels(self) -> np.ndarray:  # (M,) uint8
        middle = (self.count - 1) / 2
        squares = self.count * (self.count**2 - 1) / 12  # of the centred indices
        delta = (self.moment - middle * self.total) / squares * (self.count - 1)
        level = float(self.last.mean()) if self.mean_loss is None else self.mean_loss
        return labels(delta, self.last, self.threshold, level)


class Share(NamedTuple):
    """Of one class: its part of the tokens with a bootstrap interval, and its mean loss."""

    share: float
    low: float  # 2.5th percentile
    high: float  # 97.5th percentile
    count: int


def class_shares(label: np.ndarray, samples: int = 1000, seed: int = 0) -> dict[str, Share]:
    """Shares of the classes; drawing M tokens anew and counting is one multinomial draw."""
    counts = np.bincount(label, minlength=len(CLASSES))
    drawn = np.random.default_rng(seed).multinomial(len(label), counts / len(label), samples)
    low, high = np.quantile(drawn / len(label), [0.025, 0.975], axis=0)
    return {
        name: Share(float(counts[i] / len(label)), float(low[i]), float(high[i]), int(counts[i]))
        for i, name in enumerate(CLASSES)
    }


def class_losses(label: np.ndarray, losses: Sequence[np.ndarray]) -> np.ndarray:
    """(C, 4): mean loss of each class at every checkpoint; NaN for a class without tokens."""
    counts = np.bincount(label, minlength=len(CLASSES)).astype(np.float64)
    sums = np.stack([np.bincount(label, column, len(CLASSES)) for column in losses])
    with np.errstate(invalid="ignore"):
        return sums / counts
