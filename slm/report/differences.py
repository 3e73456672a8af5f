"""Differences between arms, with intervals: over seeds, and over held-out windows.

Windows differ far more from each other than arms do, so arms are compared window by window. Both
losses are means over tokens: their difference is a ratio of sums, and its standard error that of
survey sampling, sqrt(n / (n - 1) * sum (d_i - d * t_i)^2) / sum t_i, with d_i the difference of the
nats of window i, t_i its targets and d the difference of the losses. It says what other text of
the same kind would change, not what another seed would.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from slm.evaluate.losses import WindowLosses
from slm.report.arms import Arm, Run

MIN_WINDOWS = 4  # fewer say nothing of their spread


class Difference(NamedTuple):
    """In nats per token, the mean over seeds."""

    mean: float
    half: float | None  # of the 95% interval over windows, its half width
    seeds: list[float]  # of each seed that both arms have, none where one has it twice


def difference(arm: Arm, controls: Sequence[Run], name: str) -> Difference:
    """The arm's final loss on the set `name` minus the controls'."""
    mean = float(np.mean(arm.losses(name)) - np.mean([final_loss(run, name) for run in controls]))
    mine, theirs = mean_windows(arm.runs, name), mean_windows(controls, name)
    half = None if mine is None or theirs is None else half_width(mine, theirs)
    return Difference(mean, half, seed_differences(arm.runs, controls, name))


def final_loss(run: Run, name: str) -> float:
    return float(run.curves[name].loss[-1])


def mean_windows(runs: Sequence[Run], name: str) -> WindowLosses | None:
    """Mean nats of the seeds; None where a run has no losses of the same windows."""
    found = [losses for run in runs if (losses := run.final_windows(name)) is not None]
    if len(found) < len(runs) or not all(same_windows(found[0], other) for other in found):
        return None
    return found[0]._replace(nats=np.mean([losses.nats for losses in found], axis=0))


def same_windows(one: WindowLosses, other: WindowLosses) -> bool:
    return np.array_equal(one.window, other.window) and np.array_equal(one.targets, other.targets)


def half_width(one: WindowLosses, other: WindowLosses) -> float | None:
    """Of the 95% interval of the difference of the two losses, as this file says."""
    count = len(one.window)
    if count < MIN_WINDOWS or not same_windows(one, other):
        return None
    nats, targets = one.nats - other.nats, one.targets
    rest = nats - nats.sum() / targets.sum() * targets
    error = np.sqrt(count / (count - 1) * np.square(rest).sum()) / targets.sum()
    return float(student(count - 1) * error)


def student(freedom: int, level: float = 0.05) -> float:
    """What Student's t is beyond, to either side, with the chance `level`; from 3 degrees of
    freedom on within 2% at the usual one (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(1 - level / 2)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def seed_differences(runs: Sequence[Run], controls: Sequence[Run], name: str) -> list[float]:
    """Paired: runs with one order of the data."""
    theirs = {run.order: run for run in controls}
    if len(theirs) < len(controls):
        return []
    return [
        final_loss(run, name) - final_loss(theirs[run.order], name)
        for run in runs
        if run.order in theirs
    ]
