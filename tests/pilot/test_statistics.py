"""Intervals on losses whose truth is known: how often they hold it, alone and in a whole pilot."""

from functools import partial

import numpy as np
import pytest

from slm.pilot.answers import judged
from slm.pilot.losses import Measured, with_base
from slm.pilot.statistics import Resampled, crossings, ends, resampled_sums
from slm.pilot.verdict import BEFORE, MIXED, Rules, excess, random, sequential
from slm.selection.names import ALL_TOKENS

DOCUMENTS, SEEDS = 40, 6
ARMS = (ALL_TOKENS, random(0.5), excess(0.5))


def made(generator: np.random.Generator, truth: dict[str, float]) -> Measured:
    """Losses of arms that differ by `truth` in the mean: documents of different lengths and levels,
    which react to an arm each in its own way, and seeds with luck of their own."""
    targets = generator.integers(20, 200, DOCUMENTS)
    level = generator.normal(4, 1, DOCUMENTS)
    nats = {}
    for arm, mean in truth.items():
        taste = generator.normal(0, 0.03, DOCUMENTS)
        luck = generator.normal(0, 0.02, SEEDS)
        each = generator.normal(0, 0.02, (SEEDS, DOCUMENTS))
        loss = level + mean + taste + luck[:, None] + each
        nats[arm] = {s: np.stack([9 * targets, loss[s] * targets]) for s in range(SEEDS)}
    return Measured("made", targets, np.array([0, 100]), nats)


def first_seeds(found: Measured, seeds: dict[str, int]) -> Measured:
    few = {arm: {s: of[s] for s in range(seeds[arm])} for arm, of in found.nats.items()}
    return found._replace(nats=few)


def missed(count: int, draws: int = 400) -> float:
    """How often an interval that misses with a chance of 10% does."""
    generator, misses = np.random.default_rng(0), 0
    for _ in range(count):
        found = made(generator, {ALL_TOKENS: 0.0, excess(0.5): -0.05})
        one = Resampled(first_seeds(found, dict.fromkeys(ARMS, 3)), draws=draws)
        interval = one.difference(excess(0.5), ALL_TOKENS, 0.1)
        misses += not interval.low <= -0.05 <= interval.high
    return misses / count


def test_an_interval_holds_the_truth_as_often_as_it_says():
    assert 0.03 <= missed(250) <= 0.14  # 0.1, and two standard errors


def test_documents_alone_would_hold_it_far_too_rarely(monkeypatch):
    monkeypatch.setattr(Resampled, "luck", lambda self, each: np.zeros(self.draws))
    assert missed(60) > 0.3


def verdicts(count: int, truth: dict[str, float], level: float = 0.1) -> list[str]:
    """Of whole pilots, which add seeds while a question is open."""
    generator, found = np.random.default_rng(1), []
    rules = Rules([0.5], 2, SEEDS, level, 0.01, MIXED in truth)
    for _ in range(count):
        losses = made(generator, truth)
        look = partial(looked, losses, rules)
        found.append(sequential(rules, list(truth), look).verdict.choice)
    return found


def looked(losses: Measured, rules: Rules, seeds: dict[str, int]):
    few = with_base(first_seeds(losses, seeds), BEFORE, ALL_TOKENS)
    one = Resampled(few, draws=400)
    return judged(one, rules, {0.5: None}, target_tokens=1)


def test_selection_is_advised_no_more_often_than_the_level_where_it_cannot_help():
    found = verdicts(80, dict.fromkeys(ARMS, 0.0))
    assert found.count("select") <= 0.1 * 80
    assert set(found) <= {"select", "all", "cannot tell"}


def test_it_is_advised_where_it_helps_much_and_mixing_where_that_helps_more():
    truth = {ALL_TOKENS: 0.0, random(0.5): 0.1, excess(0.5): -0.4}
    assert verdicts(20, truth).count("select") >= 19
    assert verdicts(20, truth | {MIXED: -0.8}).count("mix") >= 19


def test_all_tokens_are_advised_where_selection_harms():
    assert verdicts(20, dict(zip(ARMS, (0.0, 0.4, 0.4), strict=True))).count("all") >= 19


def test_one_seed_decides_nothing():
    found = made(np.random.default_rng(2), dict(zip(ARMS, (0.0, 0.0, -1.0), strict=True)))
    few = with_base(first_seeds(found, dict.fromkeys(ARMS, 1)), BEFORE, ALL_TOKENS)
    one = Resampled(few, draws=200)
    known = judged(one, Rules([0.5], 1, 1, 0.05, 0.01, False), {0.5: None}, 1)
    assert known.intervals[excess(0.5), ALL_TOKENS].high < 0
    assert known.helps(0.5) == "open"


def test_draws_are_paired_over_arms_and_a_difference_is_that_of_the_losses():
    found = made(np.random.default_rng(3), dict.fromkeys(ARMS, 0.0))
    same = found._replace(nats={ALL_TOKENS: found.nats[ALL_TOKENS]} | {"b": found.nats[ALL_TOKENS]})
    none = Resampled(same, draws=200).difference("b", ALL_TOKENS, 0.05)
    assert (none.mean, none.low, none.high) == (0, 0, 0)
    one = Resampled(found, draws=200)
    wanted = [
        (found.nats[excess(0.5)][s][-1] - found.nats[ALL_TOKENS][s][-1]).sum() / found.targets.sum()
        for s in range(SEEDS)
    ]
    difference = one.difference(excess(0.5), ALL_TOKENS, 0.05)
    assert difference.mean == pytest.approx(np.mean(wanted))
    assert difference.of_seeds == pytest.approx(np.std(wanted, ddof=1) / np.sqrt(SEEDS))


def test_sums_of_draws_are_those_of_documents_taken_one_by_one():
    columns = np.arange(12.0).reshape(2, 6)
    sums = resampled_sums(columns, seed=5, draws=700)
    counts = np.random.default_rng([5, 0]).multinomial(6, [1 / 6] * 6, 500)
    assert sums[:500] == pytest.approx(counts @ columns.T) and len(sums) == 700
    assert ends(np.arange(101.0), 0.1) == (5, 95)


def test_a_curve_is_crossed_on_the_line_between_its_points():
    seen = np.array([0, 100, 200])
    curves = np.array([[5.0, 3.0, 2.0]] * 4)
    found = crossings(seen, curves, np.array([4.0, 2.5, 1.9, 6.0]))
    assert found.tolist() == [0.25, 0.75, np.inf, 0]


def test_tokens_to_equal_loss_of_known_curves():
    targets = np.full(10, 50)
    falls = {ALL_TOKENS: (5.0, 4.0, 3.0), excess(0.5): (5.0, 3.0, 2.5)}
    nats = {
        arm: {s: np.outer(np.array(loss) + 0.001 * s, targets) for s in range(3)}
        for arm, loss in falls.items()
    }
    one = Resampled(Measured("made", targets, np.array([0, 100, 200]), nats), draws=200)
    reach = one.reach(excess(0.5), ALL_TOKENS, 0.05)
    assert reach.mean == pytest.approx(0.5) and reach.low == pytest.approx(0.5, abs=1e-6)
    assert one.reach(ALL_TOKENS, excess(0.5), 0.05).mean == np.inf
    risen = {a: {s: n[::-1] for s, n in of.items()} for a, of in nats.items()}
    other = Resampled(one.found._replace(nats=risen), draws=200)
    assert np.isnan(other.reach(excess(0.5), ALL_TOKENS, 0.05).mean)
