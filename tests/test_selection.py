"""The selection rules against brute force; the control's budget, its independence and its hash."""

import math

import numpy as np
import pytest
import torch

from slm.data import IGNORE_INDEX, Batch, Order, Steps, Windows
from slm.errors import UserError
from slm.selection import SCOPES, All, Excess, Random, Selection, hashed_scores, mix, num_selected
from slm_kernels import select_top_k

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
    """What the selective loss does with the rule's answer."""
    criterion = rule.criterion(batch)
    candidates = (batch["targets"] != IGNORE_INDEX) & ~criterion.reference_loss.isnan()
    excess = token_loss - criterion.reference_loss
    return select_top_k(excess, candidates, criterion.select_ratio, scope=rule.scope)


def count(ratio: float, num_candidates: int) -> int:
    return min(num_candidates, max(1, math.floor(ratio * num_candidates + 0.5)))


def brute_force(scores: torch.Tensor, live: torch.Tensor, ratio: float, scope: str) -> list[list]:
    """[row, column] of the highest scores, ties to the first; Python's sort, nothing else."""
    places = [[r, c] for r in range(len(scores)) for c in range(scores.shape[1]) if live[r, c]]
    groups = [places] if scope == "batch" else [[p for p in places if p[0] == r] for r in range(64)]
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
    criterion = Excess(1.0).criterion(batch)
    assert criterion.reference_loss.isnan().nonzero().tolist() == [[0, 2]]
    token_loss = torch.ones(2, 6)
    token_loss[0, 2] = 1e6
    assert not select(Excess(1.0), batch, token_loss)[0, 2]


def test_excess_without_references_in_the_batch_fails():
    batch = make_batch(2, 6, seed=5)
    del batch["reference_logprob"]
    with pytest.raises(KeyError, match="reference_logprob"):
        Excess(0.5).criterion(batch)
    assert Excess(0.5).needs_references
    assert not All().needs_references
    assert not Random(0.5, seed=0).needs_references


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, 60, math.nan])
def test_ratio_outside_0_1_is_refused(ratio):
    for make in (lambda: Excess(ratio), lambda: Random(ratio, seed=0)):
        with pytest.raises(UserError, match=rf"select_ratio is {ratio}, it must be in \(0, 1\]"):
            make()


def test_unknown_scope_is_refused():
    for make in (lambda: Excess(0.5, "row"), lambda: Random(0.5, seed=0, scope="row")):
        with pytest.raises(UserError, match=r"scope is 'row', .*\('batch', 'sequence'\)"):
            make()


# ---- the budget is known beforehand ---------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.6, 0.999, 1.0])
def test_excess_and_random_select_the_number_that_was_announced(ratio, scope):
    batches = [make_batch(3, 13, seed, ignored=0.4) for seed in range(5)]
    batches[1]["targets"][0] = IGNORE_INDEX  # a window without a target
    batches[1]["reference_logprob"][0] = torch.nan
    valid = torch.stack([(batch["targets"] != IGNORE_INDEX).sum(1) for batch in batches])
    announced = num_selected(Excess(ratio, scope), valid)
    assert announced == num_selected(Random(ratio, 0, scope), valid)
    by_hand = valid.flatten() if scope == "sequence" else valid.sum(1)
    assert announced == sum(count(ratio, int(number)) for number in by_hand)
    for rule in (Excess(ratio, scope), Random(ratio, 0, scope)):
        found = sum(int(select(rule, batch, torch.rand(3, 13)).sum()) for batch in batches)
        assert found == announced


def test_all_announces_every_target():
    assert num_selected(All(), torch.tensor([[3, 4], [0, 5]])) == 12


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


def test_random_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        criterion = Random(0.5, seed=0).criterion(make_batch(2, 5, seed=0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert criterion.reference_loss.dtype == torch.float32
