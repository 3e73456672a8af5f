"""`select_ratio` over training: a number, or points in tokens seen between which it moves.

    0.6                                                      constant
    {shape: linear, points: [[0, 1.0], [2_000_000, 0.6]]}    from everything down to 60%

shape:  step (a ratio holds until the next point), linear, or cosine (half a wave between
        neighbouring points). Before the first point its ratio holds, after the last one the last.

A pure function of the tokens seen, so a continued run goes on exactly.
"""

import bisect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from slm.checks import check_value, is_list, real, word
from slm.errors import UserError

SHAPES = ("step", "linear", "cosine")


class RatioSchedule(NamedTuple):
    """Points (tokens_seen, select_ratio) in ascending order."""

    shape: str
    points: tuple[tuple[int, float], ...]

    def at(self, tokens_seen: int) -> float:
        index = bisect.bisect_right(self.points, tokens_seen, key=lambda point: point[0])
        (start, before), (end, after) = (
            self.points[max(0, index - 1)],
            self.points[min(index, len(self.points) - 1)],
        )
        if self.shape == "step" or start >= end:
            return before
        part = (tokens_seen - start) / (end - start)
        if self.shape == "cosine":
            part = 0.5 * (1 - math.cos(math.pi * part))
        return before + (after - before) * part


def ratio_schedule(value: Any, key: str = "selection.select_ratio") -> RatioSchedule:
    """Of a number or of {shape, points}, as the configuration has it; raises UserError."""
    if not isinstance(value, Mapping):
        return RatioSchedule("step", ((0, checked_ratio(value, key)),))
    if set(value) != {"shape", "points"}:
        raise UserError(f"{key} has {sorted(value)}, it must have shape and points, or be a number")
    check_value(f"{key}.shape", value["shape"], word(*SHAPES))
    return RatioSchedule(value["shape"], checked_points(value["points"], f"{key}.points"))


def checked_ratio(value: Any, key: str) -> float:
    check_value(key, value, real(0, 1, "(]"))
    return float(value)


def checked_points(value: Any, key: str) -> tuple[tuple[int, float], ...]:
    if not is_list(value) or not value:
        raise UserError(f"{key} is {value!r}, it must be a list of [tokens_seen, select_ratio]")
    points = tuple(checked_point(point, f"{key}[{i}]") for i, point in enumerate(value))
    for (before, _), (after, _) in zip(points, points[1:], strict=False):
        if after <= before:
            raise UserError(f"{key}: {after} tokens come after {before}, they must ascend")
    return points


def checked_point(value: Any, key: str) -> tuple[int, float]:
    if not is_list(value) or len(value) != 2:
        raise UserError(f"{key} is {value!r}, it must be [tokens_seen, select_ratio]")
    tokens, ratio = value
    check_value(f"{key}: tokens_seen", tokens, real(0))
    return int(tokens), checked_ratio(ratio, key)
