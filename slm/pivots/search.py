"""Pivotal token search (Phi-4 report, section 4.3, figure 4), and confirmation with fresh samples.

A completion is cut in two where the probability of success moves over it by the gap, each half
again, down to single tokens. A cut is at half of the cumulative log-probability, since most tokens
of a completion are certain. All completions of all questions are cut together, a round a depth, so
that what each round needs is sampled at once.

The probability at a prefix is an estimate, and of the many tokens that are tried those stand out
whose estimates are wrong. So a token that was found is a candidate, and both its prefixes are
sampled again; chance.py says which are believed. Costs about m log2(L) + 2 prefixes for m pivots
in L tokens, and two more for each candidate. Finds every pivot only where no later token undoes
what an earlier one did.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from slm.pivots.chance import expected_false, least_count


class Node(NamedTuple):
    """A place where completions can go on: a question and the tokens that were said."""

    question: str
    prefix: tuple[int, ...]


class Solution(NamedTuple):
    """A whole completion, from its first token to the EOS."""

    question: str
    ids: tuple[int, ...]
    logprobs: Sequence[float]  # of each token, nats
    right: bool


class Candidate(NamedTuple):
    """A token that seems to move the probability of success."""

    before: Node
    after: Node
    right: bool | None  # of `after`, where that is a whole completion, else None

    @property
    def token(self) -> int:
        return self.after.prefix[-1]


class Pivot(NamedTuple):
    """With the numbers of right ones among its fresh samples."""

    candidate: Candidate
    right_before: int
    right_after: int


class Confirmed(NamedTuple):
    pivots: list[Pivot]
    expected_false: float  # at most so many of them move nothing, on average


class Segment(NamedTuple):
    """Tokens [start, end) of a solution."""

    solution: Solution
    start: int
    end: int

    def node(self, position: int) -> Node:
        return Node(self.solution.question, self.solution.ids[:position])


# How many of a fixed number of completions of each are right.
Measure = Callable[[Sequence[Node]], Mapping[Node, int]]


def search(
    solutions: Sequence[Solution], measure: Measure, samples: int, gap: float
) -> list[Candidate]:
    """Single tokens over which the estimates move by `gap`, in the order of the solutions."""
    least = least_count(gap, samples)
    opened = [Segment(one, 0, len(one.ids)) for one in solutions]
    found: list[Segment] = []
    while opened:
        before, after = counted(opened, measure, samples)
        steps = zip(opened, before, after, strict=True)
        moved = [one for one, a, b in steps if abs(b - a) >= least]
        found += [one for one in moved if one.end - one.start == 1]
        opened = [half for one in moved if one.end - one.start > 1 for half in halves(one)]
    order = {id(one): number for number, one in enumerate(solutions)}
    found.sort(key=lambda one: (order[id(one.solution)], one.start))
    return list(dict.fromkeys(map(candidate, found)))  # solutions may begin alike


def counted(
    segments: Sequence[Segment], measure: Measure, samples: int
) -> tuple[list[int], list[int]]:
    """Right samples at the start and at the end of each; at a solution's end nothing is sampled."""
    starts = [one.node(one.start) for one in segments]
    ends = [one.node(one.end) if one.end < len(one.solution.ids) else None for one in segments]
    found = measure(list(dict.fromkeys(node for node in [*starts, *ends] if node is not None)))
    after = [
        samples * one.solution.right if node is None else found[node]
        for one, node in zip(segments, ends, strict=True)
    ]
    return [found[node] for node in starts], after


def halves(one: Segment) -> tuple[Segment, Segment]:
    """Cut where the log-probability of the left part is nearest to half of the whole."""
    sums = list(accumulate(one.solution.logprobs[one.start : one.end]))
    length = len(sums)
    off = [(abs(sums[n - 1] - sums[-1] / 2), abs(2 * n - length)) for n in range(1, length)]
    cut = one.start + 1 + off.index(min(off))
    return one._replace(end=cut), one._replace(start=cut)


def candidate(one: Segment) -> Candidate:
    whole = one.end == len(one.solution.ids)
    return Candidate(one.node(one.start), one.node(one.end), one.solution.right if whole else None)


def confirm(
    candidates: Sequence[Candidate], measure: Measure, samples: int, least: int
) -> Confirmed:
    """Those that move it by `least` right samples of fresh ones, which the search has not seen."""
    nodes = [one.before for one in candidates]
    nodes += [one.after for one in candidates if one.right is None]
    found = measure(list(dict.fromkeys(nodes)))
    after = [found[c.after] if c.right is None else samples * c.right for c in candidates]
    tried = [Pivot(c, found[c.before], n) for c, n in zip(candidates, after, strict=True)]
    moves = [abs(one.right_after - one.right_before) for one in tried]
    kept = [one for one, move in zip(tried, moves, strict=True) if move >= least]
    return Confirmed(kept, expected_false(moves, samples, least))
