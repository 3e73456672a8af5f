"""What selection costs in all: training the reference, scoring, and a target on fewer tokens.

Of N target tokens, of which the ratio r is seen until the loss of all tokens on N is reached:

    all tokens    N * a
    selection     R + r * N * (e + s)

a and e are what a token costs a target on all tokens and one on selected ones, s what scoring it
costs, R what training the reference did. Selection has paid from N = R / (a - r * (e + s)) on. Of
several targets of N tokens on one reference each costs r * N * e, and scoring is paid once.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slm.pilot.statistics import Interval
from slm.store.files import Json


class Costs(NamedTuple):
    """In one unit, FLOPs or seconds."""

    all: float  # a
    excess: float  # e
    scoring: float  # s
    reference: float | None  # R, None: the reference's folder does not say; counted as 0

    def share(self, ratio: float, tokens: float) -> float:
        """Of what all tokens cost."""
        spent = (self.reference or 0.0) + ratio * tokens * (self.excess + self.scoring)
        return spent / (tokens * self.all)

    def break_even_tokens(self, ratio: float) -> float:
        saved = self.all - ratio * (self.excess + self.scoring)
        return (self.reference or 0.0) / saved if saved > 0 else np.inf

    def break_even_runs(self, ratio: float, tokens: float) -> float:
        """Targets of so many tokens each."""
        saved = self.all - ratio * self.excess
        once = (self.reference or 0.0) + ratio * tokens * self.scoring
        return once / (tokens * saved) if saved > 0 else np.inf


def mapped(reach: Interval, value: Callable[[float], float]) -> Json:
    """What grows with the ratio, at its mean and ends; null: never."""
    found = {name: value(getattr(reach, name)) for name in ("mean", "low", "high")}
    return {name: finite(number) for name, number in found.items()}


def reached(reach: Interval) -> str:
    """In a word, since a null says neither why."""
    if np.isnan(reach.mean):
        return "all tokens learn nothing"
    return "yes" if np.isfinite(reach.mean) else "no"


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def pays(costs: Costs | None, reach: Interval, tokens: float) -> str:
    """Does it at so many target tokens? yes, no, open; unknown where nothing was counted, or all
    tokens learned nothing that could be reached sooner."""
    if costs is None or np.isnan(reach.mean):
        return "unknown"
    if costs.share(reach.high, tokens) < 1:
        return "yes"
    return "no" if costs.share(reach.low, tokens) >= 1 else "open"


def cost_record(costs: Costs, reach: Interval, tokens: int) -> Json:
    """Of the whole page: the ratios and the break-even, with their intervals."""
    per_token = costs._replace(reference=0.0)
    return {
        "ratio_of_targets_alone": mapped(reach, lambda r: r * costs.excess / costs.all),
        "ratio_with_scoring": mapped(reach, lambda r: per_token.share(r, 1.0)),
        "ratio_at_target_tokens": mapped(reach, lambda r: costs.share(r, tokens)),
        "break_even_tokens": mapped(reach, costs.break_even_tokens),
        "break_even_runs": mapped(reach, lambda r: costs.break_even_runs(r, tokens)),
        "counted": costs._asdict(),
    }
