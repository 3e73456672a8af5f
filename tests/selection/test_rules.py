"""The selection rules: polarity by hand, ranks by brute force, weights by their formula.

And the random control's budget, its independence of the split, and its hash.
"""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from slm.errors import UserError
from slm.selection.purposes import Forget, LongGain, smoothed
from slm.selection.rule import SCOPES, Selection
from slm.selection.rules import (
    All,
    Entropy,
    Excess,
    Intersection,
    Loss,
    Middle,
    Mixture,
    Overconfident,
    Random,
    ReferenceEntropy,
    ReferenceLoss,
    Union,
    hashed_scores,
    mix,
)
from slm.selection.soft import Probability, Relu, Sigmoid, Softmax
from slm.store.windows import IGNORE_INDEX, Batch, Windows
from slm.train.order import Order, Steps

MASK64 = 2**64 - 1


def make_batch(num_rows: int, length: int, seed: int, ignored: float = 0.0) -> Batch:
    """Targets, of which a share is ignored; scores under the live ones; window numbers, pass 0."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 50, (num_rows, length), generator=generator)
    dead = torch.rand(targets.shape, generator=generator) < ignored
    targets = targets.masked_fill(dead, IGNORE_INDEX)
    reference = -5 * torch.rand(targets.shape, generator=generator)
    return {
        "targets": targets,
        "reference_logprob": reference.masked_fill(dead, torch.nan),
        "window": torch.arange(num_rows) + 7 * seed,
        "epoch": torch.zeros(num_rows, dtype=torch.int64),
    }


def select(rule: Selection, batch: Batch, token_loss: torch.Tensor) -> torch.Tensor:
    losses = token_loss if rule.needs_token_loss else None
    return rule.choose(batch, losses, tokens_seen=0).selected


def count(ratio: float, num_candidates: int) -> int:
    return min(num_candidates, max(1, math.floor(ratio * num_candidates + 0.5)))


def brute_force(scores: torch.Tensor, live: torch.Tensor, ratio: float, scope: str) -> list[list]:
    """[row, column] of the highest scores, ties to the first; Python's sort, nothing else."""
    places = [[r, c] for r in range(len(scores)) for c in range(scores.shape[1]) if live[r, c]]
    rows = [[p for p in places if p[0] == r] for r in range(64)]
    groups = rows if scope == "sequence" else [places]  # one process: its batch is global
    chosen = []
    for group in groups:
        ranked = sorted(group, key=lambda place: -scores[place[0], place[1]].item())
        chosen += ranked[: count(ratio, len(group))]
    return sorted(chosen)


def splitmix64(state: int) -> int:
    """One output of the published generator, in whole numbers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
    return state ^ (state >> 31)


# ---- the rules ------------------------------------------------------------------------------


def test_all_selects_every_target_and_nothing_else():
    batch = make_batch(3, 9, seed=1, ignored=0.3)
    selected = select(All(), batch, torch.rand(3, 9))
    assert torch.equal(selected, batch["targets"] != IGNORE_INDEX)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.6, 1.0])
def test_excess_selects_what_sorting_selects(ratio, scope):
    batch = make_batch(4, 11, seed=2, ignored=0.25)
    token_loss = 5 * torch.rand(4, 11, generator=torch.Generator().manual_seed(0))
    live = batch["targets"] != IGNORE_INDEX
    expected = brute_force(token_loss + batch["reference_logprob"], live, ratio, scope)
    selected = select(Excess(ratio, scope), batch, token_loss)
    assert selected.nonzero().tolist() == expected


def test_excess_keeps_what_is_furthest_above_the_reference():
    # token_loss 5 4 3 1, reference 5 1 0.5 2: the excess is 0 3 2.5 -1. By token loss alone it
    # would be positions 0 and 1, by reference loss 0 and 3, with the sign turned 3 and 0.
    reference = torch.tensor([[5.0, 1.0, 0.5, 2.0]])
    batch = {"targets": torch.zeros(1, 4, dtype=torch.int64), "reference_logprob": -reference}
    selected = select(Excess(0.5), batch, torch.tensor([[5.0, 4.0, 3.0, 1.0]]))
    assert selected.tolist() == [[False, True, True, False]]


def test_excess_of_a_model_that_is_its_own_reference_selects_k_and_not_all():
    batch = make_batch(2, 10, seed=3)
    selected = select(Excess(0.3), batch, -batch["reference_logprob"])
    assert selected.flatten().nonzero().flatten().tolist() == list(range(6))


def test_a_token_without_a_score_is_no_candidate_and_never_plain_cross_entropy():
    batch = make_batch(2, 6, seed=4)
    batch["reference_logprob"][0, 2] = torch.nan
    token_loss = torch.ones(2, 6)
    token_loss[0, 2] = 1e6
    for rule in (Excess(1.0), ReferenceLoss(1.0), Mixture(1.0), Sigmoid(1.0), Softmax(1.0)):
        choice = rule.choose(batch, token_loss, 0)
        assert not choice.selected[0, 2] and choice.token_weight[0, 2] == 0
        assert choice.token_weight.isfinite().all()


@pytest.mark.parametrize(
    "rule",
    [Excess(0.5), ReferenceLoss(0.5), ReferenceEntropy(0.5), Intersection(0.5, 0.5), Sigmoid(1.0)],
)
def test_a_rule_without_its_scores_in_the_batch_fails(rule):
    batch = make_batch(2, 6, seed=5)
    del batch["reference_logprob"]
    with pytest.raises(KeyError, match="reference_"):
        rule.choose(batch, torch.ones(2, 6), 0)
    assert rule.needs
    assert not any(other.needs for other in (All(), Random(0.5, seed=0), Loss(0.5), Middle(0.5)))


# One window of six tokens; the last is no target. Every rule keeps something else.
#   token_loss          5.0  4.0  3.0  1.0  2.0   -
#   reference_loss      5.0  1.0  0.5  2.0  1.5   -
#   excess              0.0  3.0  2.5 -1.0  0.5   -
#   reference's entropy 0.1  3.0  2.0  0.2  1.0   -
#   own entropy         0.3  2.5  0.1  0.2  1.0   -
#   domain's loss       4.5  1.5  0.1  2.0  0.2   -
#   domain gain         0.5 -0.5  0.4  0.0  1.3   -
#   its mean over 1     0.0  2/15 -1/30 17/30 0.65
LOSSES = torch.tensor([[5.0, 4.0, 3.0, 1.0, 2.0, 9.0]])
POLARITY = [
    (All(), "111110"),
    (Excess(0.4), "011000"),  # high excess
    (Loss(0.4), "110000"),  # high loss
    (ReferenceLoss(0.4), "011000"),  # LOW reference loss: 0.5 and 1.0
    (ReferenceLoss(0.6), "011010"),
    (ReferenceEntropy(0.4), "100100"),  # LOW entropy: 0.1 and 0.2
    (Intersection(0.6, 0.6), "000010"),  # {1, 2, 4} and {0, 3, 4}
    (Union(0.4, 0.4), "111100"),  # {1, 2} or {0, 3}
    (Middle(0.6), "011010"),  # without 5.0 and 1.0
    (Relu(1.0), "011010"),  # above the reference
    (Sigmoid(1.0), "111110"),
    (Softmax(1.0), "111110"),
    (Mixture(0.4), "011000"),
    (Entropy(0.4), "010010"),  # HIGH entropy of its own: 2.5 and 1.0
    (Overconfident(0.2, low_entropy=0.6), "001000"),  # of 0.1, 0.2 and 0.3 the highest excess
    (Overconfident(0.4, low_entropy=0.6), "101000"),
    (Probability(1.0), "111110"),
    (Excess(min_excess=0.5), "011010"),  # bounds: as many as pass, ties included
    (Loss(min_loss=3.0), "111000"),
    (ReferenceLoss(max_loss=1.0), "011000"),
    (ReferenceEntropy(max_entropy=0.2), "100100"),
    (Entropy(min_entropy=1.0), "010010"),
    (Excess(min_excess=3.5), "000000"),
    (LongGain(0.4), "100100"),  # LOW excess against the short context: 1.0, 0.0
    (LongGain(min_gain=-0.5), "100110"),
    (LongGain(min_gain=-3.0, max_loss=3.0), "001110"),
    (Forget(0.4, smooth=0), "010100"),  # LOW gain of the domain: -0.5, 0.0
    (Forget(0.6, smooth=1), "111000"),
    (Forget(0.6, smooth=1, mode="replace"), "111000"),
    (Forget(max_gain=0.4, smooth=0), "011100"),
    (Forget(max_gain=-1.0, smooth=0), "000000"),
]


def six_tokens() -> Batch:
    nan = torch.nan
    return {
        "targets": torch.tensor([[1, 1, 1, 1, 1, IGNORE_INDEX]]),
        "reference_logprob": -torch.tensor([[5.0, 1.0, 0.5, 2.0, 1.5, nan]]),
        "reference_entropy": torch.tensor([[0.1, 3.0, 2.0, 0.2, 1.0, nan]]),
        "domain_logprob": -torch.tensor([[4.5, 1.5, 0.1, 2.0, 0.2, nan]]),
        "entropy": torch.tensor([[0.3, 2.5, 0.1, 0.2, 1.0, 0.0]]),
        "window": torch.zeros(1, dtype=torch.int64),
        "epoch": torch.zeros(1, dtype=torch.int64),
    }


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("rule", "kept"), POLARITY)
def test_polarity(rule, kept, scope):
    if "scope" in {field.name for field in fields(rule)}:
        rule = replace(rule, scope=scope)
    choice = rule.choose(six_tokens(), LOSSES, 0)
    assert "".join(str(int(x)) for x in choice.selected[0]) == kept
    assert choice.token_weight[0, 5] == 0


def test_thresholds_are_the_lowest_selected_score():
    def threshold(rule: Selection) -> float:
        found = rule.choose(six_tokens(), LOSSES, 0).threshold
        assert found is not None
        return found.item()

    assert threshold(Excess(0.4)) == 2.5
    assert threshold(Loss(0.4)) == 4.0
    assert threshold(ReferenceLoss(0.6)) == -1.5
    assert threshold(ReferenceEntropy(0.4)) == pytest.approx(-0.2)
    assert threshold(Middle(0.6)) == 2.0


@pytest.mark.parametrize("reach", [0, 1, 3, 40])
def test_smoothing_is_the_mean_of_the_live_places_around(reach):
    generator = torch.Generator().manual_seed(0)
    values, live = torch.randn(3, 9, generator=generator), make_batch(3, 9, 5, 0.4)["targets"] >= 0
    found = smoothed(values.masked_fill(~live, torch.nan), live, reach)
    for row, place in live.nonzero().tolist():
        near = slice(max(0, place - reach), place + reach + 1)
        mean = values[row, near][live[row, near]].mean()
        assert found[row, place].item() == pytest.approx(mean.item(), abs=1e-6)


def test_what_is_replaced_is_what_was_not_selected_one_place_on():
    batch = six_tokens() | {"input_ids": torch.tensor([[10, 11, 12, 13, 14, 15]])}
    for rule, read in [
        (Forget(0.4, smooth=0, mode="replace"), [99, 99, 12, 99, 14, 99]),  # 0, 2 and 4 go
        (Forget(0.6, smooth=1, mode="replace"), [10, 11, 12, 13, 99, 99]),  # 3 and 4 go
    ]:
        choice = rule.choose(batch, None, 0)
        assert rule.replaces and not replace(rule, mode="mask").replaces
        found = rule.read(batch, choice, 99)
        assert found["input_ids"].tolist() == [read]
        assert torch.equal(found["targets"], batch["targets"])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 15]]


# ---- weights --------------------------------------------------------------------------------

EXCESS = [0.0, 3.0, 2.5, -1.0, 0.5]


def weights(rule: Selection) -> list[float]:
    token_weight = rule.choose(six_tokens(), LOSSES, 0).token_weight
    assert token_weight.dtype == torch.float32 and not token_weight.requires_grad
    return token_weight[0].tolist()


def test_soft_weights_are_their_formula():
    sigmoid = [1 / (1 + math.exp(-x / 0.5)) for x in EXCESS]
    assert weights(Sigmoid(0.5)) == pytest.approx([*sigmoid, 0])
    assert weights(Relu(2.0)) == pytest.approx([0, 1.5, 1.25, 0, 0.25, 0])
    assert weights(Relu(2.0, cap=1.3)) == pytest.approx([0, 1.3, 1.25, 0, 0.25, 0])
    exps = [math.exp(x / 2.0) for x in EXCESS]
    softmax = [5 * x / sum(exps) for x in exps]
    assert weights(Softmax(2.0)) == pytest.approx([*softmax, 0])
    assert sum(weights(Softmax(0.1))) == pytest.approx(5)
    power = [math.exp(-2 * x) for x in LOSSES[0, :5].tolist()]  # p^2
    assert weights(Probability(2.0)) == pytest.approx([*power, 0])
    assert weights(Softmax(2.0, cap=1.0)) == pytest.approx([*(min(x, 1.0) for x in softmax), 0])


def test_mixture_is_both_losses_in_one():
    # K = 2 of N = 5: 0.25 * mean of all + 0.75 * mean of the selected, times K.
    by_hand = [0.25 * 2 / 5 + 0.75 * (i in (1, 2)) for i in range(5)]
    assert weights(Mixture(0.4, clm_weight=0.25)) == pytest.approx([*by_hand, 0])


@pytest.mark.parametrize("scope", SCOPES)
def test_softmax_sums_to_the_number_of_targets_of_its_scope(scope):
    batch = make_batch(4, 11, seed=2, ignored=0.25)
    batch["targets"][3] = IGNORE_INDEX
    token_loss = 300 * torch.rand(4, 11)
    rule = Softmax(0.7, scope=scope)
    token_weight = rule.choose(batch, token_loss, 0).token_weight
    valid = batch["targets"] != IGNORE_INDEX
    axis = (1,) if scope == "sequence" else (0, 1)
    torch.testing.assert_close(token_weight.sum(axis), valid.sum(axis).float())
    assert (token_weight[~valid] == 0).all()


def test_soft_weights_carry_no_gradient_and_are_finite_for_any_excess():
    batch = make_batch(1, 4, seed=0)
    batch["reference_logprob"] = torch.tensor([[-1e4, -0.0, -1.0, -3.0]])
    token_loss = torch.tensor([[0.0, 1e4, 1.0, 2.0]])
    for rule in (Sigmoid(0.01), Softmax(0.01), Relu(0.01, cap=5.0)):
        assert rule.choose(batch, token_loss, 0).token_weight.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sigmoid(0), "selection.temperature is 0, it must be a number above 0"),
        (lambda: Softmax(1.0, cap=-1), "selection.cap is -1, it must be a number above 0"),
        (lambda: Relu(math.nan), "selection.temperature is nan"),
        (
            lambda: Mixture(0.5, clm_weight=1),
            r"selection.clm_weight is 1, .*a number in \(0, 1\)",
        ),
        (
            lambda: Intersection(0.5, 2),
            r"selection.entropy_ratio is 2, .*a number in \(0, 1\]",
        ),
        (lambda: Union(0, 0.5), r"selection.loss_ratio is 0, .*a number in \(0, 1\]"),
        (lambda: Softmax(1.0, scope="row"), "selection.scope is 'row'"),
        (lambda: Probability(0), "selection.power is 0, it must be a number above 0"),
        (lambda: Excess(), r"selection.select_ratio is null, .*a number in \(0, 1\]"),
        (
            lambda: Loss(0.5, min_loss=2),
            "select_ratio is 0.5 and selection.min_loss is 2: a share or a bound",
        ),
        (lambda: ReferenceLoss(max_loss=math.nan), "selection.max_loss is nan, it must be a num"),
        (lambda: LongGain(0.5, max_loss=2.0), "max_loss is 2.0 and selection.min_gain null"),
        (lambda: Forget(0.5, mode="drop"), r"selection.mode is 'drop', .*\('mask', 'replace'\)"),
        (lambda: Forget(0.5, smooth=-1), "selection.smooth is -1"),
        (lambda: Forget(0.5, max_gain=1), "select_ratio is 0.5 and selection.max_gain is 1"),
        (
            lambda: Overconfident({"shape": "step", "points": [[0, 0.5], [9, 0.6]]}),
            "select_ratio is 0.6 and selection.low_entropy is 0.5: no more can be taken",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ---- schedules and rows ---------------------------------------------------------------------


def test_the_ratio_follows_its_schedule():
    points = {"shape": "linear", "points": [[100, 1.0], [300, 0.5]]}
    batch, token_loss = make_batch(4, 25, seed=1), torch.rand(4, 25)
    for rule in (Excess(points), Random(points, seed=0), Loss(points), Mixture(points)):
        kept = [int(rule.choose(batch, token_loss, seen).selected.sum()) for seen in (0, 200, 400)]
        assert kept == [100, 75, 50]
    kept = [int(Middle(points).choose(batch, token_loss, seen).selected.sum()) for seen in (0, 400)]
    assert kept == [100, 50]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.77, 1.0])
def test_no_rule_gives_more_weights_than_it_announces(ratio, scope):
    batch = make_batch(5, 13, seed=3, ignored=0.3)
    batch["reference_entropy"] = batch["entropy"] = torch.rand(5, 13)
    batch["domain_logprob"] = -torch.rand(5, 13)
    token_loss = torch.rand(5, 13)
    rules = [
        *(kind(ratio, scope) for kind in (Excess, Loss, ReferenceLoss, ReferenceEntropy, Middle)),
        *(kind(ratio, scope) for kind in (LongGain, Forget)),
        Random(ratio, scope, seed=0),
        Entropy(ratio, scope),
        Overconfident(ratio / 2, scope, low_entropy=max(ratio / 2, 0.37)),
        Mixture(ratio, scope),
        Intersection(ratio, 0.5, scope),
        Union(ratio, 0.5, scope),
        All(),
        Softmax(1.0, scope=scope),
    ]
    for rule in rules:
        rows = int((rule.choose(batch, token_loss, 0).token_weight != 0).sum())
        limit = rule.max_rows(batch, 0)
        assert rows <= (65 if limit is None else limit)


def test_middle_keeps_the_middle_whatever_ties():
    batch = make_batch(1, 10, seed=0)
    token_loss = torch.tensor([[0.0, 9, 1, 8, 2, 7, 3, 6, 4, 5]])
    assert sorted(token_loss[select(Middle(0.4), batch, token_loss)].tolist()) == [3, 4, 5, 6]
    for ratio in (0.1, 0.25, 0.5, 0.6, 0.9):
        kept = int(select(Middle(ratio), batch, torch.ones(1, 10)).sum())
        assert abs(kept - 10 * ratio) <= 1
    assert select(Middle(1.0), batch, token_loss).all()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, 60, math.nan])
def test_ratio_outside_0_1_is_refused(ratio):
    for make in (lambda: Excess(ratio), lambda: Random(ratio, seed=0)):
        with pytest.raises(UserError, match=rf"select_ratio is {ratio}, .*a number in \(0, 1\]"):
            make()


def test_unknown_scope_is_refused():
    for make in (lambda: Excess(0.5, "row"), lambda: Random(0.5, seed=0, scope="row")):
        with pytest.raises(UserError, match=r"scope is 'row', .*\('sequence', 'batch', 'global'\)"):
            make()


# ---- the budget -----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.6, 0.999, 1.0])
def test_rules_and_random_select_the_same_number(ratio, scope):
    batch = make_batch(3, 13, seed=1, ignored=0.4)
    batch["targets"][0] = IGNORE_INDEX  # a window without a target
    batch["reference_logprob"][0] = torch.nan
    batch["domain_logprob"] = batch["reference_logprob"] / 2
    per_row = (batch["targets"] != IGNORE_INDEX).sum(1)
    groups = per_row if scope == "sequence" else per_row.sum()[None]
    expected = sum(count(ratio, int(number)) for number in groups)
    kinds = (Excess, LongGain, Forget)
    for rule in (*(kind(ratio, scope) for kind in kinds), Random(ratio, scope, seed=0)):
        assert int(select(rule, batch, torch.rand(3, 13)).sum()) == expected


# ---- the random control ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_random_selects_the_highest_hashes_whatever_the_loss(scope):
    batch = make_batch(4, 11, seed=6, ignored=0.25)
    scores = hashed_scores(batch["window"], batch["epoch"], 11, 9)
    expected = brute_force(scores, batch["targets"] != IGNORE_INDEX, 0.4, scope)
    rule = Random(0.4, seed=9, scope=scope)
    for token_loss in (torch.rand(4, 11), torch.zeros(4, 11), 1000 * torch.rand(4, 11)):
        assert select(rule, batch, token_loss).nonzero().tolist() == expected


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (1, 2), (2, 2), (4, 1)])
def test_random_does_not_depend_on_ranks_or_micro_batches(text_corpus, world_size, micro):
    windows = Windows(text_corpus)
    rule = Random(0.5, seed=3, scope="sequence")
    whole = Steps(windows, Order(len(windows), 1), 8, 8)[5]  # the second pass begins in step 5
    assert not isinstance(whole, UserError)
    expected = select(rule, whole[0], torch.zeros(8, 16))
    chosen = {}
    for rank in range(world_size):
        step = Steps(windows, Order(len(windows), 1), 8, micro, rank, world_size)[5]
        assert not isinstance(step, UserError)
        for batch in step:
            rows = select(rule, batch, torch.zeros(micro, 16))
            chosen |= dict(zip(batch["window"].tolist(), rows, strict=True))
    together = torch.stack([chosen[window] for window in whole[0]["window"].tolist()])
    assert torch.equal(together, expected)


def test_random_differs_between_passes_seeds_and_windows():
    batch, loss = make_batch(4, 50, seed=7), torch.zeros(4, 50)
    first = select(Random(0.5, seed=0), batch, loss)
    again = select(Random(0.5, seed=0), batch, loss)
    next_pass = select(Random(0.5, seed=0), batch | {"epoch": batch["epoch"] + 1}, loss)
    other_seed = select(Random(0.5, seed=1), batch, loss)
    moved = select(Random(0.5, seed=0), batch | {"window": batch["window"] + 4}, loss)
    assert torch.equal(first, again)
    for other in (next_pass, other_seed, moved):
        # Independent halves agree on half of the 200 tokens; 65 to 135 is five standard deviations.
        assert 65 <= int((first == other).sum()) <= 135
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_hash_equals_splitmix64_in_whole_numbers(seed):
    windows, epochs = [0, 1, 12345, 2**40], [0, 3, 1, 2]
    scores = hashed_scores(torch.tensor(windows), torch.tensor(epochs), 6, seed)
    for row, (window, epoch) in enumerate(zip(windows, epochs, strict=True)):
        for position in range(6):
            state = splitmix64(splitmix64(splitmix64(splitmix64(seed) + window) + epoch) + position)
            assert scores[row, position].item() == (state >> 11) / 2**53


def test_mix_is_the_published_generator():
    # The first outputs of splitmix64 with seed 0: state n * gamma.
    gamma = 0x9E3779B97F4A7C15
    found = [int(mix(torch.tensor((n * gamma) - 2**64 * (n * gamma >= 2**63)))) for n in (0, 1)]
    assert [number & MASK64 for number in found] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_hash_is_uniform_and_its_neighbours_are_independent():
    scores = hashed_scores(torch.arange(400), torch.zeros(400, dtype=torch.int64), 250, 0).numpy()
    observed, _ = np.histogram(scores, bins=100, range=(0, 1))
    chi_square = ((observed - 1000) ** 2 / 1000).sum()
    assert 49 < chi_square < 168  # 99 degrees of freedom; outside with probability 2e-5
    assert abs(scores.mean() - 0.5) < 5 * math.sqrt(1 / 12 / scores.size)
    for one, other in ((scores[:, 1:], scores[:, :-1]), (scores[1:], scores[:-1])):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(one.size)


def test_random_has_no_favourite_positions():
    num_rows, length = 2000, 32
    batch = make_batch(num_rows, length, seed=0)
    chosen = select(Random(0.25, seed=5, scope="sequence"), batch, torch.zeros(num_rows, length))
    counts = chosen.sum(0).double()
    chi_square = ((counts - 500) ** 2 / (500 * 0.75)).sum().item() * (length - 1) / length
    assert chi_square < 70  # 31 degrees of freedom; above with probability 1e-4
