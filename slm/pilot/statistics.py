"""Intervals: a paired bootstrap over held-out documents, and what another seed would change.

The losses of two arms on a set are ratios of sums over documents, and a draw of as many documents
with replacement gives both of them again, on the same documents. Draws of documents say what other
text of the same kind would change, and nothing of what another run would: two arms that differ by
luck alone differ on every document. So a seed is a whole pilot of its own (sample, order, random
selection), and what its difference scatters by, s / sqrt(seeds), is added to each draw times a draw
of Student's t with seeds - 1 degrees of freedom. The two are added as if they were independent; the
scatter of seeds holds a little of that of documents, so the interval is rather too wide. With one
seed there is no interval of this kind, and nothing is decided.
"""

from typing import NamedTuple

import numpy as np

from slm.pilot.losses import Measured

DRAWS = 4000
AT_ONCE = 500  # draws


class Interval(NamedTuple):
    """low and high may be infinite; of documents alone with one seed."""

    mean: float
    low: float
    high: float
    seeds: int
    documents: int
    of_seeds: float = np.nan  # standard error of the mean, nats
    of_documents: float = np.nan

    @property
    def is_whole(self) -> bool:
        return self.seeds > 1


class Resampled:
    """All losses of one set on every draw of its documents: paired, since all have one draw."""

    def __init__(self, found: Measured, seed: int = 0, draws: int = DRAWS):
        self.found, self.draws = found, draws
        keys = [(arm, number) for arm, of in found.nats.items() for number in of]
        columns = np.concatenate([found.nats[arm][number] for arm, number in keys])  # (A * P, D)
        points, count = len(found.seen), len(found.targets)
        sums = resampled_sums(np.vstack([found.targets, columns]), seed, draws)
        exact = columns.sum(1) / found.targets.sum()
        # A draw of D documents scatters by sqrt((D - 1) / D) of what D documents do.
        wider = np.sqrt(count / max(1, count - 1))
        losses = exact + (sums[:, 1:] / sums[:, :1] - exact) * wider
        self.exact = dict(zip(keys, exact.reshape(-1, points), strict=True))  # (P,)
        self.loss = dict(  # (draws, P)
            zip(keys, losses.reshape(draws, -1, points).swapaxes(0, 1), strict=True)
        )
        self.seed = seed

    def seeds(self, *arms: str) -> list[int]:
        """That all of them have."""
        return sorted(set.intersection(*(set(self.found.nats[arm]) for arm in arms)))

    def difference(self, one: str, other: str, level: float) -> Interval:
        """Final loss of `one` minus that of `other`, nats per token."""
        seeds = self.seeds(one, other)
        each = np.array([self.exact[one, s][-1] - self.exact[other, s][-1] for s in seeds])
        drawn = np.mean([self.loss[one, s][:, -1] - self.loss[other, s][:, -1] for s in seeds], 0)
        error = standard_error(each)
        low, high = ends(drawn + self.luck(each), level)
        sizes = (len(seeds), len(self.found.targets), error, float(drawn.std()))
        return Interval(float(each.mean()), low, high, *sizes)

    def luck(self, each: np.ndarray) -> np.ndarray:  # (seeds,) -> (draws,)
        """What other seeds would change their mean by."""
        if len(each) < 2:
            return np.zeros(self.draws)
        drawn = np.random.default_rng([self.seed, 1]).standard_t(len(each) - 1, self.draws)
        return standard_error(each) * drawn

    def reach(self, one: str, other: str, level: float) -> Interval:
        """Tokens until `one` is at the final loss of `other`, as a share of all that it saw.

        On the mean curve of the seeds, a line between measurements; infinite where it is not there
        at its end, NaN where `other` ends no lower than both began: there is nothing to reach. Of
        each draw of documents both curves are those of the draw; luck of seeds moves the level.
        """
        seeds, seen = self.seeds(one, other), self.found.seen
        finals = np.array([self.exact[other, s][-1] - self.exact[one, s][-1] for s in seeds])
        level_now = np.mean([self.exact[other, s][-1] for s in seeds])
        curve = np.mean([self.exact[one, s] for s in seeds], 0)
        if level_now >= curve[0]:
            return Interval(np.nan, np.nan, np.nan, len(seeds), len(self.found.targets))
        levels = np.mean([self.loss[other, s][:, -1] for s in seeds], 0) + self.luck(finals)
        curves = np.mean([self.loss[one, s] for s in seeds], 0)  # (draws, P)
        drawn = crossings(seen, curves, levels)
        low, high = ends(drawn, level)
        mean = float(crossings(seen, curve[None], np.array([level_now]))[0])
        return Interval(mean, low, high, len(seeds), len(self.found.targets))


def resampled_sums(columns: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """(C, D) -> (draws, C): sums over D documents that are drawn with replacement."""
    count = columns.shape[1]
    generator = np.random.default_rng([seed, 0])
    parts = []
    for start in range(0, draws, AT_ONCE):
        size = min(AT_ONCE, draws - start)
        parts.append(generator.multinomial(count, [1 / count] * count, size) @ columns.T)
    return np.concatenate(parts)


def standard_error(each: np.ndarray) -> float:
    return float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else np.nan


def ends(drawn: np.ndarray, level: float) -> tuple[float, float]:
    """Of the two-sided interval that misses with the chance `level`; no line between draws."""
    low, high = np.quantile(drawn, [level / 2, 1 - level / 2], method="nearest")
    return float(low), float(high)


def crossings(
    seen: np.ndarray,  # (P,)
    curves: np.ndarray,  # (n, P)
    levels: np.ndarray,  # (n,)
) -> np.ndarray:  # (n,)
    """Where each curve first is at or below its level, over the last of `seen`; or infinite."""
    below = curves <= levels[:, None]
    last, rows = below.argmax(1), np.arange(len(curves))
    first = np.maximum(0, last - 1)
    fall = curves[rows, first] - curves[rows, last]
    share = np.where(fall > 0, (curves[rows, first] - levels) / np.where(fall > 0, fall, 1), 1.0)
    at = seen[first] + share * (seen[last] - seen[first])
    return np.where(below.any(1), at / seen[-1], np.inf)
