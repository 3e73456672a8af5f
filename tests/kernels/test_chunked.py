"""Chunked against the definition: values, gradients, precision, what it must not touch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_kernels import chunked, token_cross_entropy, weighted_cross_entropy
from slm_kernels.reference import Head

HEADS = [
    {},
    {"logit_scale": 0.37},
    {"softcap": 1.5},
    {"logit_scale": -1.3, "softcap": 4.0},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(chunked, "_tile_shape", lambda device: (5, 8))


def gradients(problem, implementation, use_bias=True, upstream=1.0, **options):
    leaves = (problem.hidden, problem.weight, problem.bias)[: 3 if use_bias else 2]
    loss = weighted_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.token_weight,
        bias=problem.bias if use_bias else None,
        denominator=3.0,
        implementation=implementation,
        **options,
    )
    return loss, torch.autograd.grad(loss, leaves, torch.tensor(upstream).to(loss))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_values_and_gradients_are_the_definition(make_problem, head, use_bias):
    problem = make_problem()
    loss, grads = gradients(problem, "chunked", use_bias, **head)
    expected_loss, expected = gradients(problem, "reference", use_bias, **head)
    torch.testing.assert_close(loss, expected_loss)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head", HEADS)
def test_per_token_values_are_the_definition(make_problem, head):
    p = make_problem()
    ours, theirs = (
        token_cross_entropy(
            p.hidden,
            p.weight,
            p.targets,
            want_entropy=True,
            bias=p.bias,
            implementation=implementation,
            **head,
        )
        for implementation in ("chunked", "reference")
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    z = head.get("logit_scale", 1.0) * F.linear(p.hidden, p.weight, p.bias)
    if "softcap" in head:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    valid = p.targets != -100
    torch.testing.assert_close(ours.lse[valid], z.logsumexp(1)[valid].detach())


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 23),
    width=st.integers(1, 5),
    vocab_size=st.sampled_from([1, 2, 7, 8, 9, 31]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    unweighted=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(num_tokens, width, vocab_size, ignored, unweighted, seed):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=random, dtype=torch.float64)
    weight = torch.randn(vocab_size, width, generator=random, dtype=torch.float64)
    targets = torch.randint(vocab_size, (num_tokens,), generator=random)
    targets[torch.rand(num_tokens, generator=random) < ignored] = -100
    token_weight = torch.randn(num_tokens, generator=random)
    token_weight[torch.rand(num_tokens, generator=random) < unweighted] = 0
    results = []
    for implementation in ("chunked", "reference"):
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        loss = weighted_cross_entropy(
            *leaves, targets, token_weight, denominator=2.5, implementation=implementation
        )
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(make_problem, head):
    p = make_problem(num_tokens=11, width=3, vocab_size=10)

    def loss(hidden, weight, bias):
        return weighted_cross_entropy(
            hidden,
            weight,
            p.targets,
            p.token_weight,
            bias=bias,
            denominator=1.7,
            implementation="chunked",
            **head,
        )

    assert torch.autograd.gradcheck(loss, (p.hidden, p.weight, p.bias))


@pytest.mark.parametrize("upstream", [-2.5, 0.0, 1e-3, 1e4])
def test_upstream_gradient(make_problem, upstream):
    problem = make_problem()
    _, ours = gradients(problem, "chunked", upstream=upstream)
    _, ones = gradients(problem, "reference")
    for a, b in zip(ours, ones, strict=True):
        torch.testing.assert_close(a, upstream * b)


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loses_no_more_than_torch_in_the_same_dtype(make_problem, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "_tile_shape", lambda device: (64, 96))
    p = make_problem(num_tokens=257, width=64, vocab_size=401, dtype=dtype)
    exact = p._replace(
        **{
            k: getattr(p, k).detach().double().requires_grad_()
            for k in ("hidden", "weight", "bias")
        }
    )
    loss, ours = gradients(p, "chunked")
    exact_loss, expected = gradients(exact, "reference")
    z = F.linear(p.hidden, p.weight, p.bias)
    torch_losses = F.cross_entropy(z, p.targets, reduction="none").double()
    torch_loss = (torch_losses * p.token_weight).sum() / 3
    theirs = torch.autograd.grad(torch_loss, (p.hidden, p.weight, p.bias))
    allowed = abs(torch_loss - exact_loss).item() + 1e-6 * abs(exact_loss).item()
    assert abs(loss.double() - exact_loss).item() <= 1.25 * allowed
    for name, a, b, c in zip(("hidden", "weight", "bias"), ours, theirs, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, c) <= 1.25 * relative_error(b, c), name


def test_bfloat16_losses_come_from_float32_accumulators(make_problem):
    p = make_problem(num_tokens=200, width=64, vocab_size=100, dtype=torch.bfloat16)
    loss = token_cross_entropy(p.hidden, p.weight, p.targets, implementation="chunked").loss
    z = p.hidden.detach().double() @ p.weight.detach().double().T
    exact = F.cross_entropy(z, p.targets, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, atol=1e-4, rtol=1e-5)
    assert (loss >= 0).all()


def one_row(z, target):
    """Logits as the head of a one-dimensional hidden state."""
    weight = torch.tensor(z)[:, None]
    hidden = torch.ones(1, 1, requires_grad=True)
    return hidden, weight.requires_grad_(), torch.tensor([target])


def test_confident_token_keeps_its_digits():
    # p = 1 - 4e-6: the gradient at the target must agree with the loss, and not be rounded to 0.
    hidden, weight, targets = one_row([13.0, 0.5, *[-30.0] * 9], 0)
    loss = weighted_cross_entropy(hidden, weight, targets, torch.ones(1))
    loss.backward()
    z = weight.detach().double()[:, 0]
    exact = (z[1:] - z[0]).exp().sum().log1p().item()
    assert weight.grad is not None
    assert loss.item() == pytest.approx(exact, rel=1e-1)
    assert weight.grad[0, 0].item() == pytest.approx(math.expm1(-loss.item()), rel=1e-5)
    assert loss.item() > 0


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size, softcap):
    z = (torch.linspace(-1, 1, 20) * size).tolist()
    results = []
    for implementation in ("chunked", "reference"):
        hidden, weight, targets = one_row(z, 7)
        loss = weighted_cross_entropy(
            hidden, weight, targets, torch.ones(1), softcap=softcap, implementation=implementation
        )
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs)


def test_huge_close_logits_lose_nothing_to_a_rounded_lse():
    z = [10000.0, 10000.5, 9999.25, *[0.0] * 10]
    hidden, weight, targets = one_row(z, 0)
    weighted_cross_entropy(hidden, weight, targets, torch.ones(1)).backward()
    expected = torch.tensor(z, dtype=torch.float64).softmax(0)
    expected[0] -= 1
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:, 0].double(), expected, atol=1e-7, rtol=1e-6)


def test_equal_logits_have_log_vocabulary_loss_and_entropy():
    hidden, weight, targets = one_row([2.0] * 19, 11)
    scores = token_cross_entropy(hidden, weight, targets, want_entropy=True)
    assert scores.entropy is not None
    assert scores.loss.item() == pytest.approx(math.log(19), rel=1e-6)
    assert scores.entropy.item() == pytest.approx(math.log(19), rel=1e-6)


def test_impossible_words_take_part_in_nothing():
    p = torch.tensor([0.5, 0.25, 0.25])
    bias = torch.full((12,), -torch.inf)
    bias[[0, 5, 11]] = p.log()
    scores = token_cross_entropy(
        torch.zeros(1, 2), torch.zeros(12, 2), torch.tensor([5]), want_entropy=True, bias=bias
    )
    assert scores.entropy is not None
    assert scores.loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert scores.entropy.item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    impossible = token_cross_entropy(
        torch.zeros(1, 2), torch.zeros(12, 2), torch.tensor([3]), bias=bias
    )
    assert impossible.loss.item() == math.inf


@pytest.mark.parametrize("places", [(3, 4), (3, 12), (7, 8), (0, 18)])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_correct_is_the_lowest_index_of_the_maximum(places, implementation):
    # Two equal maxima, in one tile or in two (tiles are eight wide).
    z = torch.zeros(19)
    z[list(places)] = 3.0
    scores = token_cross_entropy(
        torch.ones(19, 1), z[:, None], torch.arange(19), implementation=implementation
    )
    assert scores.correct.nonzero().squeeze(1).tolist() == [places[0]]


def test_duplicated_rows_have_equal_losses_and_gradients(make_problem):
    p = make_problem(num_tokens=12, ignored=0.0)
    double = p._replace(
        hidden=torch.cat([p.hidden, p.hidden]).detach().requires_grad_(),
        targets=torch.cat([p.targets, p.targets]),
        token_weight=torch.cat([p.token_weight, p.token_weight]),
    )
    _, (grad_hidden, grad_weight, _) = gradients(double, "chunked")
    _, (_, single, _) = gradients(p, "chunked")
    torch.testing.assert_close(grad_hidden[:12], grad_hidden[12:])
    torch.testing.assert_close(grad_weight, 2 * single)


def test_rows_without_weight_are_exactly_zero_and_reach_nothing(make_problem):
    p = make_problem(dtype=torch.float32)
    silent = torch.arange(37) % 3 == 0
    p = p._replace(token_weight=p.token_weight.masked_fill(silent, 0))
    _, (grad_hidden, *others) = gradients(p, "chunked")
    assert (grad_hidden[silent] == 0).all()
    moved = torch.where(silent[:, None], 50 * p.hidden.detach() + 3, p.hidden.detach())
    _, (moved_grad, *moved_others) = gradients(p._replace(hidden=moved.requires_grad_()), "chunked")
    assert torch.equal(moved_grad, grad_hidden)
    assert all(torch.equal(a, b) for a, b in zip(others, moved_others, strict=True))


def test_only_rows_with_weight_are_computed_again(make_problem, monkeypatch):
    p = make_problem(vocab_size=8)  # one tile of vocabulary: a row is computed once
    p = p._replace(token_weight=p.token_weight.masked_fill(torch.arange(37) % 3 == 0, 0))
    loss = weighted_cross_entropy(p.hidden, p.weight, p.targets, p.token_weight)
    rows = []
    tile_logits = chunked._tile_logits

    def counted(block, *rest):
        rows.append(len(block))
        return tile_logits(block, *rest)

    monkeypatch.setattr(chunked, "_tile_logits", counted)
    loss.backward()
    assert sum(rows) == ((p.token_weight != 0) & (p.targets != -100)).sum()


def test_ignored_rows_may_hold_anything(make_problem):
    p = make_problem()
    hole = p.targets == -100
    broken = p.hidden.detach().masked_fill(hole[:, None], torch.nan).requires_grad_()
    loss, grads = gradients(p._replace(hidden=broken), "chunked")
    expected_loss, expected = gradients(p, "reference")
    torch.testing.assert_close(loss, expected_loss)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bitwise_repeatable(make_problem):
    p = make_problem(num_tokens=301, width=33, vocab_size=97, dtype=torch.float32)
    first = gradients(p, "chunked")
    for _ in range(5):
        again = gradients(p, "chunked")
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(a, b) for a, b in zip(again[1], first[1], strict=True))


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


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_operand(make_problem, frozen):
    p = make_problem()
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    _, expected = gradients(p, "reference")
    wanted = dict(zip(leaves, expected, strict=True))
    leaves[frozen].requires_grad_(False)
    weighted_cross_entropy(
        p.hidden,
        p.weight,
        p.targets,
        p.token_weight,
        bias=p.bias,
        denominator=3.0,
        implementation="chunked",
    ).backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, wanted[name])


def test_strided_operands(make_problem):
    p = make_problem()
    hidden = p.hidden.detach().T.contiguous().T.requires_grad_()
    weight = torch.stack([p.weight.detach(), p.weight.detach()], dim=2)[..., 0].requires_grad_()
    _, expected = gradients(p, "reference")
    _, grads = gradients(p._replace(hidden=hidden, weight=weight), "chunked")
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_twice_with_a_retained_graph(make_problem):
    p = make_problem()
    loss = weighted_cross_entropy(p.hidden, p.weight, p.targets, p.token_weight.abs())
    first = torch.autograd.grad(loss, (p.hidden, p.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (p.hidden, p.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weight_tied_to_the_embedding(make_problem):
    p = make_problem()
    tokens = torch.arange(37) % 29
    results = []
    for implementation in ("chunked", "reference"):
        weight = p.weight.detach().clone().requires_grad_()
        loss = weighted_cross_entropy(
            torch.tanh(weight[tokens]),
            weight,
            p.targets,
            p.token_weight,
            denominator=2.0,
            implementation=implementation,
        )
        results.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*results)


def test_gradient_changed_in_place_is_noticed(make_problem):
    p = make_problem()
    hidden = p.hidden * 1
    loss = weighted_cross_entropy(hidden, p.weight, p.targets, p.token_weight)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
