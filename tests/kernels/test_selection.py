"""The selected set against brute force, on one process and on several."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_kernels import select_count, select_top_k


def brute_force(scores, candidates, ratio):
    """Python's own sort: highest score, then lowest index; NaN above everything."""
    places = [i for i, candidate in enumerate(candidates) if candidate]
    if not places:
        return [False] * len(scores)
    count = min(max(math.floor(ratio * len(places) + 0.5), 1), len(places))
    rank = {i: (math.inf, 1) if math.isnan(scores[i]) else (scores[i], 0) for i in places}
    best = sorted(places, key=lambda i: (-rank[i][0], -rank[i][1], i))[:count]
    return [i in best for i in range(len(scores))]


SCORES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=24),
    ratio=st.floats(0.001, 1.0),
)
def test_batch_and_sequence_are_brute_force(dtype, tokens, ratio):
    scores = torch.tensor([score for score, _ in tokens], dtype=dtype)
    candidates = torch.tensor([candidate for _, candidate in tokens])
    expected = brute_force(scores.tolist(), candidates.tolist(), ratio)
    assert select_top_k(scores, candidates, ratio).tolist() == expected
    assert select_top_k(scores, candidates, ratio, scope="sequence").tolist() == expected


def test_scopes_differ_as_they_should():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [4.0, 3.0, 2.0, 1.0]])
    candidates = torch.ones(2, 4, dtype=torch.bool)
    batch = select_top_k(scores, candidates, 0.5)
    assert batch.tolist() == [[True] * 4, [False] * 4]
    rows = select_top_k(scores, candidates, 0.5, scope="sequence")
    assert rows.tolist() == [[True, True, False, False]] * 2


def test_highest_scores_are_selected_not_lowest():
    selected = select_top_k(torch.tensor([-3.0, 5.0, -7.0]), torch.ones(3, dtype=torch.bool), 0.34)
    assert selected.tolist() == [False, True, False]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 1.0])
def test_ties_do_not_select_more_than_k(ratio):
    # A mask `scores >= kth` would take all ten.
    selected = select_top_k(torch.zeros(10), torch.ones(10, dtype=torch.bool), ratio)
    assert selected.tolist() == [i < round(10 * ratio) for i in range(10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_zero_ties_with_zero(dtype):
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0], dtype=dtype)
    candidates = torch.ones(4, dtype=torch.bool)
    assert select_top_k(scores, candidates, 0.25).tolist() == [True, False, False, False]
    assert select_top_k(scores, candidates, 0.75).tolist() == [True, True, True, False]


def test_rows_of_many_axes():
    scores = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    candidates = scores < 1
    selected = select_top_k(scores, candidates, 0.4, scope="sequence")
    for i in range(2):
        for j in range(3):
            row = brute_force(scores[i, j].tolist(), candidates[i, j].tolist(), 0.4)
            assert selected[i, j].tolist() == row


def test_padding_is_never_selected_even_with_the_highest_score():
    scores = torch.tensor([100.0, 1.0, -math.inf, math.nan])
    candidates = torch.tensor([False, True, True, False])
    assert select_top_k(scores, candidates, 1.0).tolist() == [False, True, True, False]


def test_strided_scores():
    scores = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).T
    candidates = (scores > -1).T.contiguous().T
    expected = brute_force(scores.flatten().tolist(), candidates.flatten().tolist(), 0.3)
    assert select_top_k(scores, candidates, 0.3).flatten().tolist() == expected


@given(count=st.integers(0, 10**9), ratio=st.floats(1e-6, 1.0))
def test_count_is_the_formula(count, ratio):
    expected = min(max(math.floor(ratio * count + 0.5), 1), count)
    assert select_count(torch.tensor(count), ratio).item() == expected


def test_counts_by_hand():
    counts = torch.tensor([0, 1, 2, 4, 5, 10])
    assert select_count(counts, 0.5).tolist() == [0, 1, 1, 2, 3, 5]
    assert select_count(counts, 0.01).tolist() == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select_ratio": 0.0}, r"\(0, 1\], got 0.0"),
        ({"select_ratio": 1.1}, r"\(0, 1\], got 1.1"),
        ({"select_ratio": math.nan}, r"\(0, 1\], got nan"),
        ({"scope": "row"}, "sequence, batch, global, got 'row'"),
        ({"scope": "global"}, "got group=None"),
        ({"candidates": torch.ones(4, dtype=torch.bool)}, r"\(3,\) and \(4,\)"),
        ({"candidates": torch.ones(3)}, "bool, got torch.float32"),
        ({"scores": torch.zeros(3, dtype=torch.bfloat16)}, "float64, got torch.bfloat16"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "scores": torch.zeros(3),
        "candidates": torch.ones(3, dtype=torch.bool),
        "select_ratio": 0.5,
        "scope": "batch",
    } | change
    with pytest.raises(ValueError, match=message):
        select_top_k(
            arguments["scores"],
            arguments["candidates"],
            arguments["select_ratio"],
            scope=arguments["scope"],
        )


def test_quick_enough():
    scores = torch.randn(16384, generator=torch.Generator().manual_seed(0))
    candidates = scores < 2
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        select_top_k(scores, candidates, 0.6)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005


CASES = [  # (scores of all ranks one after the other, ratio, dtype)
    ([0.0] * 12, 0.5, torch.float32),
    ([-0.0, 0.0] * 6, 0.4, torch.float32),
    (
        [3.0, 1.0, 1.0, -2.0, 1.0, 5.0, 1.0, 1.0, math.inf, -math.inf, math.nan, 1.0],
        0.6,
        torch.float32,
    ),
    ([1.0 + i % 3 * 2**-23 for i in range(12)], 0.5, torch.float32),
    ([1.0 + i % 5 * 2**-52 for i in range(12)], 0.7, torch.float64),
    ([-float(i) for i in range(12)], 0.01, torch.float32),
    ([float(i) for i in range(12)], 1.0, torch.float64),
]


def candidates_of(case):
    return [(i * 7 + case) % 5 != 0 for i in range(12)] if case else [True] * 12


def select_on_a_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    # Ranks of unequal size; on four, the last has no token at all.
    mine = slice(*{2: ((0, 5), (5, 12)), 4: ((0, 2), (2, 9), (9, 12), (12, 12))}[world][rank])
    for number, (scores, ratio, dtype) in enumerate(CASES):
        for case in (0, number + 1):
            selected = select_top_k(
                torch.tensor(scores, dtype=dtype)[mine],
                torch.tensor(candidates_of(case))[mine],
                ratio,
                scope="global",
                group=dist.group.WORLD,
            )
            expected = brute_force(scores, candidates_of(case), ratio)[mine]
            assert selected.tolist() == expected, (rank, number, case)
    none = torch.zeros(12, dtype=torch.bool)[mine]
    selected = select_top_k(
        torch.zeros(len(none)), none, 0.5, scope="global", group=dist.group.WORLD
    )
    assert not selected.any()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_global_scope_is_one_process_on_everything(world, tmp_path, run_on_ranks):
    run_on_ranks(select_on_a_rank, world, tmp_path)
