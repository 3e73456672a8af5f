"""What chance does to a search for pivots: how many that are reported move nothing.

Of n fresh samples at each of two prefixes K0 and K1 are right: two binomials that know nothing of
the search. Where the token between them moves nothing both have one p, and

    noise(n, c) = P(|K1 - K0| >= c) at p = 1/2, where it is largest,

so of m0 such candidates at most m0 * noise(n, c) are confirmed on average, whatever their p's are
and however they were found. c is fixed beforehand: p_gap * n, or more where noise would be above
`level`. m0 is not known, but those that are not confirmed tell: at least a share of 1 - noise of
the m0 are among these U, so that on average

    false ones <= m0 * noise <= (U + 1) * noise / (1 - noise),

which is stated with every run (Storey 2002; the 1 is for where U is 0 by luck). A candidate that
moves something, but less than p_gap, is not false here: the interval beside each pivot says how
much it moves.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Z = 1.959964  # of intervals of 95%


def binomial(n: int, p: float) -> np.ndarray:  # (n + 1,)
    row = np.ones(1)
    for _ in range(n):
        row = np.convolve(row, [1 - p, p])
    return row


def reported(n: int, least: int, before: float, after: float) -> float:
    """The chance that n samples at each of two prefixes differ by `least` right ones."""
    difference = np.convolve(binomial(n, after), binomial(n, before)[::-1])
    return float(difference[np.abs(np.arange(-n, n + 1)) >= least].sum())


@lru_cache(maxsize=4096)
def noise(n: int, least: int) -> float:
    return reported(n, least, 0.5, 0.5)


def least_count(gap: float, samples: int) -> int:
    """0.2 of 64 -> 13"""
    return max(1, math.ceil(gap * samples - 1e-9))


def threshold(gap: float, samples: int, level: float) -> int:
    """By so many right samples a candidate must move to be confirmed."""
    first = least_count(gap, samples)
    fits = (c for c in range(first, samples + 1) if noise(samples, c) <= level)
    return next(fits, samples + 1)


def expected_false(moves: Sequence[int], samples: int, least: int) -> float:
    """At most so many of those that move by `least` move nothing, on average.

    moves: |K1 - K0| of every candidate
    """
    if not moves or least > samples:
        return 0.0
    share = noise(samples, least)
    return (1 + sum(move < least for move in moves)) * share / (1 - share)


def interval(before: int, after: int, n: int) -> tuple[float, float]:
    """Of the difference of two shares of n, 95% (Newcombe 1998, method 10)."""
    low0, high0 = wilson(before, n)
    low1, high1 = wilson(after, n)
    p0, p1 = before / n, after / n
    down = math.hypot(p1 - low1, high0 - p0)
    up = math.hypot(high1 - p1, p0 - low0)
    return p1 - p0 - down, p1 - p0 + up


def wilson(right: int, n: int) -> tuple[float, float]:
    middle = (right + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(right * (n - right) / n + Z**2 / 4)
    return middle - half, middle + half


def more_often(right: int, n: int, other_right: int, other_n: int) -> float:
    """Fisher's exact p-value of a chance difference that large: right / n above the other's."""
    total, found = right + other_right, n + other_n
    ways = sum(
        math.comb(n, k) * math.comb(other_n, total - k) for k in range(right, min(n, total) + 1)
    )
    return ways / math.comb(found, total)
