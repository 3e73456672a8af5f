"""The four kinds of tokens: H->H, L->H, H->L, L->L, from their losses over checkpoints.

Rho-1, appendix D.1: a least-squares line through the losses l_0 ... l_n of a token over the
checkpoints' indices 0 ... n, and its change from end to end,

    delta < -threshold            H->L   learned
    delta >  threshold            L->H   forgotten
    else l_n <= mean_loss         L->L   easy from the start
    else                          H->H   not learned

where mean_loss is the mean of the last checkpoint's losses over all tokens. "H->L" is decided by
the change alone, not by the level. Costs one pass over the losses; memory is a few numbers a token
of one block, whatever the number of checkpoints.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm.errors import UserError

CLASSES = ("HH", "LH", "HL", "LL")
MEANING = {"HH": "not learned", "LH": "forgotten", "HL": "learned", "LL": "easy from the start"}
ARROWS = {"HH": "H\u2192H", "LH": "L\u2192H", "HL": "H\u2192L", "LL": "L\u2192L"}
THRESHOLD = 0.2  # nats, the paper's
BLOCK = 1 << 20  # tokens at a time: about 100 MB
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
    level = level_of(losses, mean_loss)
    parts = [
        fit_block(losses, slice(start, start + BLOCK), threshold, level)
        for start in range(0, len(losses[0]), BLOCK)
    ]
    return Trajectories(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def level_of(losses: Sequence[np.ndarray], mean_loss: float | None) -> float:
    """Between L->L and H->H, nats: what was asked for, else the mean of the last checkpoint."""
    return float(np.mean(losses[-1], dtype=np.float64)) if mean_loss is None else mean_loss


def check_losses(losses: Sequence[np.ndarray]) -> None:
    if len(losses) < MIN_CHECKPOINTS:
        raise UserError(
            f"{len(losses)} checkpoints have token losses, a trajectory needs {MIN_CHECKPOINTS}"
        )
    sizes = {len(column) for column in losses}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"the checkpoints have losses of {sorted(sizes)} tokens, one number > 0")


def fit_block(
    losses: Sequence[np.ndarray], rows: slice, threshold: float, level: float
) -> Trajectories:
    """Of some tokens: each checkpoint is read once, and three sums a token are kept."""
    size = len(losses[0][rows])
    fit, passes, squares = RunningFit(threshold, level), Passes(size, level), np.zeros(size)
    for number, column in enumerate(losses):
        block = finite(column[rows], place_of(column, number), rows.start)
        fit.add(block)
        passes.add(block)
        squares += block * block
    start, end = fit.line()
    return Trajectories(
        start=start,
        end=end,
        last=fit.last,
        variance=fit.variance(squares),
        crossings=passes.crossings,
        first_below=passes.first_below,
        label=fit.labels(),
    )


class Passes:
    """How often each of M tokens passes a level, and when it first is at or below it."""

    def __init__(self, size: int, level: float):
        self.level, self.count = level, 0
        self.crossings = np.zeros(size, np.int32)
        self.first_below = np.full(size, -1, np.int32)

    def add(self, losses: np.ndarray) -> None:  # (M,) nats
        below = losses <= self.level
        if self.count > 0:
            self.crossings += below != self.was_below
        self.first_below[below & (self.first_below < 0)] = self.count
        self.was_below = below
        self.count += 1


def place_of(column: np.ndarray, number: int) -> str:
    """The file of a mapped column."""
    return str(column.filename) if isinstance(column, np.memmap) else f"checkpoint {number}"


def finite(column: np.ndarray, place: str, start: int) -> np.ndarray:  # (m,) float64
    block = np.array(column, np.float64)
    if not np.isfinite(block).all():
        token = int(np.argmin(np.isfinite(block)))
        raise UserError(
            f"{place}: loss {block[token]} at token {start + token}, finite numbers are needed"
        )
    return block


def labels(delta: np.ndarray, last: np.ndarray, threshold: float, level: float) -> np.ndarray:
    """(m,) uint8: the paper's rule, in its order."""
    level_class = np.where(last <= level, CLASSES.index("LL"), CLASSES.index("HH"))
    rising = np.where(delta > threshold, CLASSES.index("LH"), level_class)
    return np.where(delta < -threshold, CLASSES.index("HL"), rising).astype(np.uint8)


class RunningFit:
    """The lines of M tokens through a growing number of checkpoints, from two sums a token.

    mean_loss: None takes the mean of the newest checkpoint
    """

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

    @property
    def spread(self) -> float:
        """Sum of the squared distances of the indices 0 ... n from their mean."""
        return self.count * (self.count**2 - 1) / 12

    def slope(self) -> np.ndarray:  # (M,) nats a checkpoint
        return (self.moment - (self.count - 1) / 2 * self.total) / self.spread

    def line(self) -> tuple[np.ndarray, np.ndarray]:  # (M,), (M,): its start and its end
        mean, half = self.total / self.count, self.slope() * (self.count - 1) / 2
        return mean - half, mean + half

    def variance(self, squares: np.ndarray) -> np.ndarray:  # (M,), sums of squares -> (M,)
        """Around the line; rounding must not make it negative."""
        mean = self.total / self.count
        around_mean = squares / self.count - mean**2
        return np.maximum(around_mean - self.slope() ** 2 * self.spread / self.count, 0.0)

    def labels(self) -> np.ndarray:  # (M,) uint8
        level = float(self.last.mean()) if self.mean_loss is None else self.mean_loss
        delta = self.slope() * (self.count - 1)
        return labels(delta, self.last, self.threshold, level)


class Share(NamedTuple):
    """Of one class: its part of the tokens with a bootstrap interval, and its mean loss."""

    share: float
    low: float  # 2.5th percentile
    high: float  # 97.5th percentile
    num_tokens: int


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


def draw_examples(label: np.ndarray, per_class: int, seed: int) -> list[np.ndarray]:
    """Of each class some tokens, by seed: indices into M, ascending."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(label == number) for number in range(len(CLASSES))]
    return [
        np.sort(rng.choice(group, min(per_class, len(group)), replace=False)) for group in groups
    ]
