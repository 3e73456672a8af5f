"""The tiles of the chunked implementation; its values are in test_implementations.py."""

import math

import pytest
import torch

from kernel_helpers import forget_known_weights
from slm_kernels import chunked, weighted_cross_entropy
from slm_kernels.contracts import Head


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(chunked, "_tile_shape", lambda device: (5, 8))
    monkeypatch.setattr(chunked, "CACHED_ROWS", 2)
    forget_known_weights(monkeypatch)


def gradients(problem, implementation):
    leaves = (problem.hidden, problem.weight, problem.bias)
    loss = weighted_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.token_weight,
        bias=problem.bias,
        denominator=3.0,
        implementation=implementation,
    ).loss
    return loss, torch.autograd.grad(loss, leaves)


def test_only_rows_with_weight_are_computed_again(make_problem, monkeypatch):
    p = make_problem(vocab_size=8)  # one tile of vocabulary: a row is computed once
    p = p._replace(token_weight=p.token_weight.masked_fill(torch.arange(37) % 3 == 0, 0))
    loss = weighted_cross_entropy(p.hidden, p.weight, p.targets, p.token_weight).loss
    rows = []
    tile_logits = chunked._tile_logits

    def counted(block, *rest):
        rows.append(len(block))
        return tile_logits(block, *rest)

    monkeypatch.setattr(chunked, "_tile_logits", counted)
    loss.backward()
    assert sum(rows) == ((p.token_weight != 0) & (p.targets != -100)).sum()


def test_tiles_do_not_change_the_result(make_problem, monkeypatch):
    p = make_problem()
    _, expected = gradients(p, "chunked")
    for shape in ((1, 1), (3, 29), (64, 64), (37, 5)):
        monkeypatch.setattr(chunked, "_tile_shape", lambda device, shape=shape: shape)
        _, grads = gradients(p, "chunked")
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_row_blocks_are_even_and_complete():
    for num_rows in range(0, 40):
        blocks = list(chunked.row_blocks(num_rows, 8))
        sizes = [block.stop - block.start for block in blocks]
        assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(num_rows))
        assert all(size <= 8 for size in sizes) and len(sizes) == math.ceil(num_rows / 8)


def test_no_tile_is_larger_than_it_should_be(make_problem, monkeypatch):
    p = make_problem(num_tokens=64, vocab_size=80)
    sizes = []
    tile_logits = chunked._tile_logits
    monkeypatch.setattr(
        chunked, "_tile_logits", lambda *a: sizes.append(tile_logits(*a).shape) or tile_logits(*a)
    )
    gradients(p, "chunked")
    assert sizes and all(rows <= 5 and columns <= 8 for rows, columns in sizes)


def test_default_tiles_on_a_vocabulary_larger_than_one(make_problem, monkeypatch):
    monkeypatch.undo()
    p = make_problem(num_tokens=1100, width=4, vocab_size=2050)
    _, ours = gradients(p, "chunked")
    _, theirs = gradients(p, "reference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_vocabulary_slices_cover_the_head(make_problem):
    p = make_problem()
    parts = list(chunked._vocabulary_slices(Head(p.weight, p.bias, 1.0, None), torch.float64))
    assert torch.equal(torch.cat([part.weight for part in parts]), p.weight)
    assert [part.start for part in parts] == [0, 8, 16, 24]
