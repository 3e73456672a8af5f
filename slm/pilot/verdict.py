"""From intervals to one sentence: select at k, mix the curated text in, train on all, cannot tell.

A question is a difference of two arms on the first held-out set, and its answer one of

    better, worse    its interval lies on one side of 0
    same             it lies within the margin, a difference that nobody would pay for
    open             it does neither: seeds are added, to max_seeds

Selection at k is chosen only where excess is better than random tokens of the same number, better
than all tokens *and* better than the base was, beats the mixture where there is one, and has paid
for its reference and its scores at the target's number of tokens. The chance of one such false
choice is held for all k and all looks together: each interval has the level / (ratios * looks),
Bonferroni's. That it takes several answers, each on one side, makes it rarer still. Where no arm
ends below the base nothing is decided: the arms then differ in how fast they undo what the first
steps at a high learning rate did.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

from slm.pilot.statistics import Interval
from slm.report.differences import student
from slm.selection.names import ALL_TOKENS

MIXED, REFERENCE, BEFORE = "curated text mixed in", "the reference model", "before training"
MOST_SEEDS = 10_000  # no advice is given beyond
Pair = tuple[str, str]


class Rules(NamedTuple):
    """How a pilot decides."""

    ratios: Sequence[float]
    seeds: int  # before the first look
    max_seeds: int
    level: float
    margin: float  # nats
    has_mixed: bool

    @property
    def level_each(self) -> float:
        return self.level / (len(self.ratios) * (self.max_seeds - self.seeds + 1))

    def pairs(self) -> list[Pair]:
        """All questions: the first arm minus the second."""
        found: list[Pair] = [(ALL_TOKENS, BEFORE)]
        found += [(MIXED, ALL_TOKENS), (MIXED, BEFORE)] if self.has_mixed else []
        for k in self.ratios:
            found += [(excess(k), random(k)), (excess(k), ALL_TOKENS), (excess(k), BEFORE)]
            found += [(excess(k), MIXED)] if self.has_mixed else []
        return found


def excess(k: float) -> str:
    """As slm.selection.names has it."""
    return f"excess k = {k:g}"


def random(k: float) -> str:
    return f"random k = {k:g}"


def answer(found: Interval, margin: float) -> str:
    if not found.is_whole:
        return "open"
    if found.high < 0:
        return "better"
    if found.low > 0:
        return "worse"
    return "same" if -margin < found.low and found.high < margin else "open"


class Evidence(NamedTuple):
    """What is known at a look."""

    rules: Rules
    intervals: Mapping[Pair, Interval]
    pays: Mapping[float, str]  # see costs.pays

    def answer(self, one: str, other: str) -> str:
        return answer(self.intervals[one, other], self.rules.margin)

    def helps(self, k: float) -> str:
        """yes, no, open"""
        found = {self.answer(excess(k), other) for other in (random(k), ALL_TOKENS, BEFORE)}
        if found & {"worse", "same"}:
            return "no"
        return "yes" if found == {"better"} else "open"

    def learned(self) -> bool:
        """Did any arm get below the base?"""
        pairs = [pair for pair in self.rules.pairs() if pair[1] == BEFORE]
        return any(self.answer(*pair) == "better" for pair in pairs)

    def mean(self, k: float) -> float:
        return self.intervals[excess(k), ALL_TOKENS].mean


class Verdict(NamedTuple):
    choice: str  # select, mix, all, cannot tell
    select_ratio: float | None = None
    open: Sequence[Pair] = ()  # the questions whose answers would decide it


def decide(known: Evidence) -> Verdict:
    if not known.learned():
        below = [pair for pair in known.rules.pairs() if pair[1] == BEFORE]
        return Verdict("cannot tell", open=[pair for pair in below if is_open(known, pair)])
    ratios = known.rules.ratios
    by_answer = {word: [k for k in ratios if known.helps(k) == word] for word in ("yes", "open")}
    if by_answer["yes"]:
        return chosen(known, min(by_answer["yes"], key=known.mean))
    waits = [pair for k in by_answer["open"] for pair in open_of(known, k)]
    if known.rules.has_mixed:
        mixed = known.answer(MIXED, ALL_TOKENS)
        if mixed == "better":
            mixed = known.answer(MIXED, BEFORE)
        rivals = [k for k in by_answer["open"] if not is_beaten(known, k)]
        if mixed == "better" and not rivals:
            return Verdict("mix")
        waits += [(excess(k), MIXED) for k in rivals if mixed == "better"]
        if mixed == "open":
            waits += [p for p in ((MIXED, ALL_TOKENS), (MIXED, BEFORE)) if is_open(known, p)]
    return Verdict("cannot tell", open=waits) if waits else Verdict("all")


def chosen(known: Evidence, k: float) -> Verdict:
    """Of a k that helps."""
    if known.rules.has_mixed:
        against = known.answer(excess(k), MIXED)
        if against in ("worse", "same"):  # it needs neither scores nor a reference
            return Verdict("mix", k)
        if against == "open":
            return Verdict("cannot tell", k, [(excess(k), MIXED)])
    if known.pays[k] == "no":
        return Verdict("all", k)
    if known.pays[k] == "open":
        return Verdict("cannot tell", k, [(excess(k), ALL_TOKENS)])
    return Verdict("select", k)


def is_beaten(known: Evidence, k: float) -> bool:
    return known.answer(excess(k), MIXED) in ("worse", "same")


def open_of(known: Evidence, k: float) -> list[Pair]:
    return [
        (excess(k), o) for o in (random(k), ALL_TOKENS, BEFORE) if is_open(known, (excess(k), o))
    ]


def is_open(known: Evidence, pair: Pair) -> bool:
    return known.answer(*pair) == "open"


# ---- looks --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    verdict: Verdict
    evidence: Evidence
    seeds: Mapping[str, int]  # of each arm


def sequential(
    rules: Rules, arms: Sequence[str], look: Callable[[Mapping[str, int]], Evidence]
) -> Outcome:
    """Add seeds to the arms of open questions until none is open.

    look: trains what is missing of so many seeds of each arm, and measures
    """
    seeds, count = dict.fromkeys(arms, rules.seeds), rules.seeds
    while True:
        known = look(seeds)
        verdict = decide(known)
        if not verdict.open or count == rules.max_seeds:
            return Outcome(verdict, known, seeds)
        count += 1
        seeds |= {arm: count for pair in verdict.open for arm in pair if arm in seeds}


# ---- in words -----------------------------------------------------------------------------------


def sentence(outcome: Outcome, tokens_per_arm: int) -> str:
    verdict, known = outcome.verdict, outcome.evidence
    k = verdict.select_ratio
    if verdict.choice == "select":
        assert k is not None
        others = (ALL_TOKENS, random(k), *([MIXED] if known.rules.has_mixed else []))
        return f"Select at k = {k:g}: {' and '.join(against(known, k, one) for one in others)}."
    if verdict.choice == "mix":
        return f"Mix the curated text in: {why_mix(known, k)}."
    if verdict.choice == "all":
        return f"Train on all tokens: {why_all(known, k)}."
    if not verdict.open:
        return (
            f"Cannot tell: no arm ends below the base ({difference(known, (ALL_TOKENS, BEFORE))}), "
            "so a lower learning rate or more tokens an arm are needed."
        )
    pair = verdict.open[0]
    if k is not None and known.answer(*pair) != "open":
        return (
            f"Cannot tell with this budget: {difference(known, pair)}, but whether that pays for "
            "reference and scores at the target's tokens is within the interval: more seeds would"
        ) + "."
    what, known_already = "", ""
    if k is not None and MIXED in pair:
        what, known_already = " selecting from mixing", f"{against(known, k, ALL_TOKENS)}, "
    return (
        f"Cannot tell{what} with this budget: {known_already}{difference(known, pair)}; "
        f"{more(known, pair, tokens_per_arm)}."
    )


def against(known: Evidence, k: float, other: str) -> str:
    return difference(known, (excess(k), other))


def difference(known: Evidence, pair: Pair) -> str:
    """excess k = 0.6 minus all tokens is -0.180 nats (-0.190 to -0.170)"""
    found = known.intervals[pair]
    return (
        f"{pair[0]} minus {pair[1]} is {found.mean:+.3f} nats per token "
        f"({found.low:+.3f} to {found.high:+.3f})"
    )


def why_mix(known: Evidence, k: float | None) -> str:
    if k is not None:
        return f"{against(known, k, MIXED)}, and mixing needs no reference and no scores"
    return difference(known, (MIXED, ALL_TOKENS))


def why_all(known: Evidence, k: float | None) -> str:
    if k is not None:
        return (
            f"excess k = {k:g} is better at equal tokens ({against(known, k, ALL_TOKENS)}), and at "
            "the target's tokens has not paid for its reference and its scores"
        )
    nearest = min(known.rules.ratios, key=known.mean)
    pairs = [(excess(nearest), other) for other in (ALL_TOKENS, random(nearest), BEFORE)]
    told = next(pair for pair in pairs if known.answer(*pair) in ("worse", "same"))
    return f"excess loss helps at no k of {listed(known.rules.ratios)}: {difference(known, told)}"


def listed(ratios: Sequence[float]) -> str:
    return ", ".join(f"{k:g}" for k in ratios)


def more(known: Evidence, pair: Pair, tokens_per_arm: int) -> str:
    """What would close the question, if seeds and documents go on to scatter as they did."""
    found, rules = known.intervals[pair], known.rules
    if not found.is_whole:
        return "one seed does not say what another would: seeds=3 does"
    seeds = more_seeds(found, rules)
    if seeds is None:
        wanted = math.ceil(found.documents * documents_needed(found, rules))
        return f"more seeds would not, about {wanted:,} held-out documents would"
    return (
        f"about {seeds:,} more seed{'s' * (seeds > 1)} would (max_seeds={found.seeds + seeds}), "
        f"{2 * seeds * tokens_per_arm:,} training tokens of these two arms"
    )


def wanted_half(found: Interval, rules: Rules) -> float:
    """The half width that puts the interval off 0, or into the margin."""
    return max(abs(found.mean), rules.margin - abs(found.mean))


def of_documents(found: Interval, rules: Rules) -> float:
    return NormalDist().inv_cdf(1 - rules.level_each / 2) * found.of_documents


def more_seeds(found: Interval, rules: Rules) -> int | None:
    half, rest = wanted_half(found, rules), of_documents(found, rules)
    if rest >= half:
        return None
    count = found.seeds + 1
    while count < MOST_SEEDS:
        error = found.of_seeds * math.sqrt(found.seeds / count)
        if math.hypot(rest, student(count - 1, rules.level_each) * error) < half:
            return count - found.seeds
        count += 1
    return MOST_SEEDS


def documents_needed(found: Interval, rules: Rules) -> float:
    """How many times as many, for half of the width to be left to the seeds."""
    return 2 * (of_documents(found, rules) / wanted_half(found, rules)) ** 2
