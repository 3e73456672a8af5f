"""What a pilot answers, as the JSON that its page shows: see README.md for the words.

questions       each difference with its interval and its answer, on every held-out set in domain
to_equal_loss   tokens, FLOPs and seconds until the loss of all tokens, and the break-even
elsewhere       differences on other text, on the corpus's own, on the tokens that nobody selected
keep_rates      of each source of the sample
arms            mean loss of every arm on every set
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm.pilot.costs import Costs, cost_record, finite, mapped, pays, reached
from slm.pilot.losses import HeldoutSet, measured, with_base
from slm.pilot.statistics import Interval, Resampled
from slm.pilot.verdict import (
    BEFORE,
    MIXED,
    REFERENCE,
    Evidence,
    Outcome,
    Pair,
    Rules,
    answer,
    excess,
    random,
    sentence,
)
from slm.report.arms import total
from slm.score.cost import reference_lineage, references_cost
from slm.selection.names import ALL_TOKENS
from slm.store.files import Json

SCEPTICS: list[Pair] = [(REFERENCE, ALL_TOKENS)]


class Inputs(NamedTuple):
    """What was measured so far."""

    sets: Mapping[str, HeldoutSet]
    in_domain: Sequence[str]  # of them; the first decides
    own: str  # the set that is of the corpus itself
    points: Sequence[int]  # tokens seen at each measurement
    runs: Mapping[str, Mapping[int, Path]]  # arm -> seed -> folder
    ends: Mapping[str, Mapping[int, Path]]  # what did not train here, beside each seed
    scored: Sequence[Path]  # references of the samples
    records: Mapping[tuple[str, int], Json]  # arm.json, by arm and seed
    target_tokens: int

    def resampled(self, name: str, tokens: np.ndarray | None = None, part: str = "") -> Resampled:
        """A set at the ends of the training; with `part` those of its tokens."""
        ends = (0, self.points[-1])
        found = measured(self.sets[name], self.runs, ends, tokens, part or name)
        still = measured(self.sets[name], self.ends, (0,), tokens)
        nats = {
            arm: {s: np.repeat(a, 2, 0) for s, a in of.items()} for arm, of in still.nats.items()
        }
        return Resampled(found._replace(nats=found.nats | nats))

    def during(self, name: str) -> Resampled:
        """At all measurements."""
        found = measured(self.sets[name], self.runs, self.points)
        return Resampled(with_base(found, BEFORE, ALL_TOKENS))


# ---- at a look ----------------------------------------------------------------------------------


def evidence(inputs: Inputs, rules: Rules) -> Evidence:
    return judged(
        inputs.during(inputs.in_domain[0]), rules, flops_of(inputs, rules), inputs.target_tokens
    )


def judged(
    found: Resampled, rules: Rules, costs: Mapping[float, Costs | None], target_tokens: int
) -> Evidence:
    """From losses and costs alone."""
    intervals = {pair: found.difference(*pair, rules.level_each) for pair in rules.pairs()}
    reached = {k: found.reach(excess(k), ALL_TOKENS, rules.level_each) for k in rules.ratios}
    paying = {k: pays(costs[k], reached[k], target_tokens) for k in rules.ratios}
    return Evidence(rules, intervals, paying)


def flops_of(inputs: Inputs, rules: Rules) -> dict[float, Costs | None]:
    return {k: costs_of(inputs, k, "flops") for k in rules.ratios}


def costs_of(inputs: Inputs, k: float, unit: str) -> Costs | None:
    """unit: flops or seconds; None where one of them was not counted."""
    per_token = [
        mean_per_token(inputs.records, arm, f"train_{unit}") for arm in (ALL_TOKENS, excess(k))
    ]
    scoring = [references_cost(folder) for folder in inputs.scored]
    spent, tokens = total(scoring, unit), total(scoring, "tokens")
    if None in per_token or spent is None or not tokens:
        return None
    lineage = reference_lineage(inputs.scored[0])
    reference = None if lineage is None else lineage[f"train_{unit}"]
    return Costs(*per_token, spent / tokens, reference)  # type: ignore[arg-type]


def mean_per_token(records: Mapping[tuple[str, int], Json], arm: str, field: str) -> float | None:
    mine = [record for (name, _), record in records.items() if name == arm]
    spent = [record[field] for record in mine]
    if None in spent:
        return None
    return sum(spent) / sum(record["tokens_seen"] for record in mine)


# ---- at the end ---------------------------------------------------------------------------------


def answers(inputs: Inputs, outcome: Outcome, tokens_per_arm: int) -> Json:
    rules = outcome.evidence.rules
    ends = {name: inputs.resampled(name) for name in inputs.sets}
    ends |= dict(unselected(inputs, rules.ratios))
    during = inputs.during(inputs.in_domain[0])
    verdict = outcome.verdict
    saved = {k: equal_loss(inputs, during, k, rules) for k in rules.ratios}
    words = sentence(outcome, tokens_per_arm)
    if verdict.choice == "select" and verdict.select_ratio is not None:
        best, first = excess(verdict.select_ratio), ends[inputs.in_domain[0]]
        more = [saving(saved[verdict.select_ratio]), *reference_itself(first, best, rules)]
        words = f"{words[:-1]}; {'; '.join(more)}."
    return {
        "verdict": {
            "choice": verdict.choice,
            "select_ratio": verdict.select_ratio,
            "sentence": words,
            "open": [list(pair) for pair in verdict.open],
        },
        "rules": rules._asdict() | {"level_each": rules.level_each},
        "seeds": dict(outcome.seeds),
        "tokens_per_arm": tokens_per_arm,
        "target_tokens": inputs.target_tokens,
        "heldout": {name: set_record(one) for name, one in ends.items()},
        "questions": [
            row for name in inputs.in_domain for row in rows(ends[name], rules.pairs(), rules)
        ],
        "beside": [row for name in inputs.in_domain for row in rows(ends[name], SCEPTICS, rules)],
        "to_equal_loss": [*saved.values()],
        "elsewhere": [
            row
            for name, one in ends.items()
            if name not in inputs.in_domain
            for row in rows(one, others(one, rules), rules)
        ],
        "keep_rates": {f"{k:g}": keep_rates(inputs, k) for k in rules.ratios},
        "arms": [row for one in ends.values() for row in arm_rows(one)],
        "curves": curves(during),
        "costs": spent(inputs),
    }


def reference_itself(one: Resampled, arm: str, rules: Rules) -> Iterator[str]:
    """Beside a verdict that advises `arm`, where the reference is better on the same text."""
    found = one.difference(REFERENCE, arm, rules.level_each)
    if answer(found, rules.margin) == "better":
        yield f"on this text {REFERENCE} itself is {-found.mean:.3f} nats per token lower still"


def set_record(one: Resampled) -> Json:
    return {"documents": len(one.found.targets), "targets": int(one.found.targets.sum())}


def others(one: Resampled, rules: Rules) -> list[Pair]:
    """Of the tokens outside of the top k the arms of that k."""
    arms = [arm for arm in one.found.nats if arm not in (ALL_TOKENS, BEFORE)]
    for k in rules.ratios:
        if one.found.name.endswith(outside(k)):
            arms = [arm for arm in (random(k), excess(k), MIXED) if arm in one.found.nats]
    return [(arm, ALL_TOKENS) for arm in arms]


def outside(k: float) -> str:
    return f", outside the top {k:g}"


def rows(one: Resampled, pairs: Sequence[Pair], rules: Rules) -> Iterator[Json]:
    for pair in pairs:
        found = one.difference(*pair, rules.level_each)
        yield {
            "set": one.found.name,
            "arm": pair[0],
            "minus": pair[1],
            "answer": answer(found, rules.margin),
        } | plain(found)


def plain(found: Interval) -> Json:
    return {
        key: finite(value) if isinstance(value, float) else value
        for key, value in found._asdict().items()
    }


def arm_rows(one: Resampled) -> Iterator[Json]:
    for arm, of in one.found.nats.items():
        losses = [float(one.exact[arm, seed][-1]) for seed in of]
        yield {
            "arm": arm,
            "set": one.found.name,
            "mean": float(np.mean(losses)),
            "low": min(losses),
            "high": max(losses),
            "seeds": len(losses),
        }


def curves(one: Resampled) -> Json:
    """Mean loss of the seeds at every measurement."""
    arms = {arm: of for arm, of in one.found.nats.items() if arm != BEFORE}
    means = {arm: np.mean([one.exact[arm, s] for s in of], 0).tolist() for arm, of in arms.items()}
    return {"set": one.found.name, "tokens_seen": one.found.seen.tolist(), "loss": means}


def equal_loss(inputs: Inputs, during: Resampled, k: float, rules: Rules) -> Json:
    reach = during.reach(excess(k), ALL_TOKENS, rules.level_each)
    found: Json = {"select_ratio": k, "reached": reached(reach)}
    found["tokens"] = mapped(reach, lambda ratio: ratio)
    for unit in ("flops", "seconds"):
        costs = costs_of(inputs, k, unit)
        found[unit] = None if costs is None else cost_record(costs, reach, inputs.target_tokens)
    found["clock"] = clocks(inputs.records, k)
    return found


def clocks(records: Mapping[tuple[str, int], Json], k: float) -> list[float | None]:
    """Seconds of the arm over those of all tokens, of every seed that both have (one is added to
    the arms of an open question alone): how far clocks scatter."""
    seeds = [s for arm, s in records if arm == excess(k) and (ALL_TOKENS, s) in records]
    pairs = [[records[arm, s]["train_seconds"] for arm in (excess(k), ALL_TOKENS)] for s in seeds]
    return [None if None in pair else pair[0] / pair[1] for pair in pairs]


def saving(found: Json) -> str:
    """all tokens' loss takes 35% of the tokens, and reference and scores have paid from ... on"""
    if found["reached"] != "yes":
        return "all tokens end no lower than the base, so no saving can be counted"
    tokens, flops = found["tokens"]["mean"], found["flops"]
    text = f"all tokens' loss takes {100 * tokens:.0f}% of the tokens"
    if flops is None or flops["counted"]["reference"] is None:
        return text
    paid = f"{flops['break_even_tokens']['mean']:,.0f} target tokens on"
    return f"{text}, and in FLOPs it has paid for reference and scores from {paid}"


def unselected(inputs: Inputs, ratios: Sequence[float]) -> Iterator[tuple[str, Resampled]]:
    """Of the corpus's other documents the tokens below the top k by excess under the base: one set
    of tokens for all arms, whatever each selected as it trained."""
    one = inputs.sets[inputs.own]
    base, reference = (one.read(inputs.ends[arm][0], 0) for arm in (BEFORE, REFERENCE))
    scores = np.where(one.live, base - reference, -np.inf)
    for k in ratios:
        count = max(1, round(k * int(one.live.sum())))
        least = np.sort(scores, axis=None)[-count]
        name = inputs.own + outside(k)
        if (one.live & (scores < least)).any():
            yield name, inputs.resampled(inputs.own, scores < least, name)


def keep_rates(inputs: Inputs, k: float) -> dict[str, float]:
    kept = [r["kept"] for (arm, _), r in inputs.records.items() if arm == excess(k)]
    names = dict.fromkeys(name for one in kept for name in one)
    return {name: float(np.mean([one[name] for one in kept if name in one])) for name in names}


def spent(inputs: Inputs) -> Json:
    """By the trainings and the scoring of this pilot."""
    records = [*inputs.records.values()]
    scoring = [references_cost(folder) for folder in inputs.scored]
    lineage = reference_lineage(inputs.scored[0])
    return {
        "train_seconds": total(records, "train_seconds"),
        "train_flops": total(records, "train_flops"),
        "train_tokens": total(records, "tokens_seen"),
        "score_seconds": total(scoring, "seconds"),
        "score_flops": total(scoring, "flops"),
        "reference_train_seconds": lineage and lineage["train_seconds"],
        "reference_train_flops": lineage and lineage["train_flops"],
        "devices": sorted({record["device"] for record in records}),
    }
