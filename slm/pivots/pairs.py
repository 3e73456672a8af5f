"""Preference pairs of single tokens: what was said at a pivot, and what was said there instead.

The other tokens at that place are the first tokens of its own completions, search and confirmation
together, so that pairs cost nothing more. Of those that were drawn often enough, and whose success
differs from the pivot's by more than chance (Fisher's exact test), the surest is taken.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from slm.pivots.chance import more_often
from slm.pivots.rollouts import Tally
from slm.pivots.search import Node, Pivot


class Pair(NamedTuple):
    before: Node
    chosen: int
    rejected: int
    chosen_success: float
    rejected_success: float


def pair_of(
    pivot: Pivot, samples: int, firsts: Mapping[int, Tally], least: int, level: float
) -> Pair | None:
    """samples: fresh ones behind the pivot. firsts: of the completions before it, by first token"""
    token, own = pivot.candidate.token, Tally(pivot.right_after, samples)
    rises = pivot.right_after > pivot.right_before
    tried = {
        other: more_often(*own, *one) if rises else more_often(*one, *own)
        for other, one in firsts.items()
        if other != token and one.samples >= least
    }
    sure = {other: chance for other, chance in tried.items() if chance <= level}
    if not sure:
        return None
    other = min(sure, key=lambda one: (sure[one], one))
    shares = {token: share(own), other: share(firsts[other])}
    chosen, rejected = (token, other) if rises else (other, token)
    return Pair(pivot.candidate.before, chosen, rejected, shares[chosen], shares[rejected])


def share(one: Tally) -> float:
    return one.right / one.samples


def pairs_of(
    pivots: Sequence[Pivot],
    samples: int,
    firsts: Mapping[Node, Mapping[int, Tally]],
    least: int,
    level: float,
) -> list[Pair]:
    """Each pair of tokens at a place once."""
    made = (pair_of(one, samples, firsts[one.candidate.before], least, level) for one in pivots)
    different: dict[tuple[Node, frozenset[int]], Pair] = {}
    for pair in filter(None, made):
        different.setdefault((pair.before, frozenset([pair.chosen, pair.rejected])), pair)
    return [*different.values()]
