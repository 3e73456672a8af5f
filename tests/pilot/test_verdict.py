"""From answers to one sentence: every way that they can fall."""

import re

import pytest

from slm.pilot.statistics import Interval
from slm.pilot.verdict import (
    BEFORE,
    MIXED,
    Evidence,
    Rules,
    answer,
    decide,
    excess,
    more_seeds,
    random,
    sentence,
    sequential,
)
from slm.selection.names import ALL_TOKENS, selection_name
from slm.selection.rules import Excess, Random
from slm.train.compose import node_of

WIDTHS = {
    "better": (-0.3, -0.2),
    "worse": (0.2, 0.3),
    "same": (-0.004, 0.004),
    "open": (-0.1, 0.05),
}


def interval(word: str, seeds: int = 3) -> Interval:
    low, high = WIDTHS[word]
    return Interval((low + high) / 2, low, high, seeds, 100, (high - low) / 8, (high - low) / 40)


def known(answers: dict[tuple[str, str], str], pays: str = "yes", mixed: bool = False) -> Evidence:
    """Of k = 0.5 and what stands in `answers` for other pairs; the rest is worse."""
    ratios = sorted({float(arm.split()[-1]) for arm, _ in answers if arm.startswith("excess")})
    rules = Rules(ratios, 3, 6, 0.05, 0.01, mixed)
    usual = {pair: "better" if pair[1] == BEFORE else "worse" for pair in rules.pairs()}
    found = {pair: interval(word) for pair, word in (usual | answers).items()}
    return Evidence(rules, found, dict.fromkeys(ratios, pays))


def both(k: float, chance: str, tokens: str) -> dict[tuple[str, str], str]:
    return {(excess(k), random(k)): chance, (excess(k), ALL_TOKENS): tokens}


@pytest.mark.parametrize("word", WIDTHS)
def test_answers(word):
    assert answer(interval(word), 0.01) == word
    assert answer(interval(word, seeds=1), 0.01) == "open"


def test_arms_are_called_what_their_selection_is():
    for rule, name in ((Excess(select_ratio=0.4), excess(0.4)), (Random(0.4, seed=1), random(0.4))):
        node = {k: v for k, v in node_of(rule).items() if k != "defaults"}
        assert selection_name(node) == name


@pytest.mark.parametrize(
    ("chance", "tokens", "pays", "wanted"),
    [
        ("better", "better", "yes", "select"),
        ("better", "better", "unknown", "select"),
        ("better", "better", "no", "all"),
        ("better", "better", "open", "cannot tell"),
        ("better", "same", "yes", "all"),
        ("better", "worse", "yes", "all"),
        ("worse", "better", "yes", "all"),
        ("same", "open", "yes", "all"),
        ("open", "better", "yes", "cannot tell"),
        ("better", "open", "yes", "cannot tell"),
    ],
)
def test_without_a_mixture(chance, tokens, pays, wanted):
    found = decide(known(both(0.5, chance, tokens), pays))
    assert found.choice == wanted
    assert (wanted == "cannot tell") == (len(found.open) > 0)


@pytest.mark.parametrize(
    ("answers", "mixed", "against", "wanted"),
    [
        (("better", "better"), "better", "better", "select"),
        (("better", "better"), "better", "worse", "mix"),
        (("better", "better"), "better", "same", "mix"),
        (("better", "better"), "better", "open", "cannot tell"),
        (("worse", "worse"), "better", "worse", "mix"),
        (("worse", "worse"), "open", "worse", "cannot tell"),
        (("worse", "worse"), "same", "worse", "all"),
        (("open", "open"), "better", "worse", "mix"),
        (("open", "better"), "better", "open", "cannot tell"),
    ],
)
def test_beside_a_mixture(answers, mixed, against, wanted):
    more = {(MIXED, ALL_TOKENS): mixed, (excess(0.5), MIXED): against}
    assert decide(known(both(0.5, *answers) | more, mixed=True)).choice == wanted


@pytest.mark.parametrize("word", ["worse", "same", "open"])
def test_nothing_is_decided_where_no_arm_ends_below_the_base(word):
    pairs = [(arm, BEFORE) for arm in (ALL_TOKENS, excess(0.5))]
    evidence = known(both(0.5, "better", "better") | dict.fromkeys(pairs, word))
    found = decide(evidence)
    assert found.choice == "cannot tell"
    assert list(found.open) == (pairs if word == "open" else [])
    outcome = sequential(evidence.rules, [ALL_TOKENS, excess(0.5)], lambda seeds: evidence)
    assert BEFORE not in outcome.seeds
    assert ("lower learning rate" in sentence(outcome, 9)) == (word != "open")
    learned = {(ALL_TOKENS, BEFORE): "better", (excess(0.5), BEFORE): word}
    choice = decide(known(both(0.5, "better", "better") | learned)).choice
    assert choice == ("cannot tell" if word == "open" else "all")


def test_the_best_k_that_helps_is_chosen():
    answers = both(0.4, "better", "better") | both(0.6, "better", "better")
    evidence = known(answers | both(0.8, "open", "open"))
    lower = evidence.intervals[excess(0.6), ALL_TOKENS]._replace(mean=-0.29)
    evidence = evidence._replace(intervals={**evidence.intervals, (excess(0.6), ALL_TOKENS): lower})
    assert decide(evidence).select_ratio == 0.6


def test_the_level_is_shared_out_over_ratios_and_looks():
    assert Rules([0.4, 0.6], 3, 6, 0.05, 0.01, True).level_each == 0.05 / 8


def test_seeds_are_added_to_the_arms_of_open_questions_alone():
    arms, asked = [ALL_TOKENS, random(0.5), excess(0.5)], []

    def look(seeds):
        asked.append(dict(seeds))
        return known(both(0.5, "better", "better" if seeds[excess(0.5)] > 4 else "open"))

    outcome = sequential(known(both(0.5, "open", "open")).rules, arms, look)
    assert [one[excess(0.5)] for one in asked] == [3, 4, 5]
    assert [one[random(0.5)] for one in asked] == [3, 3, 3]
    assert outcome.verdict.choice == "select" and outcome.seeds[ALL_TOKENS] == 5


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (
            known(both(0.5, "better", "better")),
            "Select at k = 0.5: excess k = 0.5 minus all tokens is -0.250 nats per token (-0.300 "
            "to -0.200) and excess k = 0.5 minus random k = 0.5 is",
        ),
        (known(both(0.5, "worse", "better")), "Train on all tokens: excess loss helps at no k of"),
        (known(both(0.5, "better", "better"), "no"), "Train on all tokens: excess k = 0.5 is bett"),
        (
            known(both(0.5, "worse", "worse") | {(MIXED, ALL_TOKENS): "better"}, mixed=True),
            "Mix the curated text in: curated text mixed in minus all tokens is -0.250",
        ),
        (
            known(both(0.5, "open", "better")),
            "Cannot tell with this budget: excess k = 0.5 minus random k = 0.5 is -0.025 nats per "
            "token (-0.100 to +0.050); about ",
        ),
        (known(both(0.5, "better", "better"), "open"), "Cannot tell .* but whether that pays"),
        (
            known(both(0.5, "better", "better") | {(excess(0.5), MIXED): "better"}, mixed=True),
            "Select at k = 0.5: .* and excess k = 0.5 minus curated text mixed in is -0.250",
        ),
        (
            known(both(0.5, "better", "better") | {(excess(0.5), MIXED): "open"}, mixed=True),
            "Cannot tell selecting from mixing with this budget: excess k = 0.5 minus all tokens "
            "is -0.250 .*, excess k = 0.5 minus curated text mixed in is -0.025 .* would",
        ),
    ],
)
def test_a_verdict_is_one_sentence(evidence, words):
    def look(seeds):
        return evidence

    text = sentence(sequential(evidence.rules, [ALL_TOKENS, excess(0.5), MIXED], look), 1000)
    start = words.replace("(", r"\(").replace(")", r"\)").replace("+", r"\+")

    assert re.match(start, text), text
    assert text.endswith(".") and ". " not in text.replace("k = 0.5", "")


def test_seeds_that_are_missing_shrink_the_interval_off_zero():
    found = Interval(-0.02, -0.06, 0.02, 3, 100, of_seeds=0.01, of_documents=0.001)
    rules = Rules([0.5], 3, 3, 0.05, 0.01, False)
    more = more_seeds(found, rules)
    assert more is not None
    halves = [2.0 * 0.01 * (3 / (3 + n)) ** 0.5 for n in (more, 1)]  # at least 1.96 errors
    assert halves[0] < 0.02 and 1 <= more < 20
    assert more_seeds(found._replace(of_documents=0.02), rules) is None
