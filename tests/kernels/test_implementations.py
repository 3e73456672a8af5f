"""Chunked and Triton against the definition in float64: values, gradients, precision, reach.

Triton runs in its interpreter where there is no GPU, on tiles small enough that these problems
cross several of them. It has no float64, so the problems are float32 there.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_helpers import device_of, forget_known_weights
from slm_kernels import chunked, token_cross_entropy, weighted_cross_entropy

HEADS = [
    {},
    {"logit_scale": 0.37},
    {"softcap": 1.5},
    {"logit_scale": -1.3, "softcap": 4.0},
]
FULL_CACHE = 2**30


class Engine(NamedTuple):
    name: str
    dtype: torch.dtype
    device: str
    tolerance: dict[str, float]

    def options(self) -> dict[str, Any]:
        return {"implementation": self.name}


@pytest.fixture(params=["chunked", "chunked, known weights", "triton"])
def engine(request, monkeypatch) -> Engine:
    """Small tiles; of chunked, both ways to the gradients."""
    monkeypatch.setattr(chunked, "_tile_shape", lambda device: (5, 8))
    monkeypatch.setattr(chunked, "CACHED_ROWS", 3)
    monkeypatch.setattr(chunked, "LEAST_ROWS", 4)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 0)
    if request.param == "chunked":
        forget_known_weights(monkeypatch)
    if request.param != "triton":
        return Engine("chunked", torch.float64, "cpu", {"rtol": 1e-7, "atol": 1e-9})
    return Engine("triton", torch.float32, device_of("triton"), {"rtol": 2e-5, "atol": 5e-6})


def placed(problem, engine, dtype=None):
    """The problem on the engine's device in its dtype, with leaves of its own."""
    dtype = engine.dtype if dtype is None else dtype
    leaves = ("hidden", "weight", "bias")
    made = {n: getattr(problem, n).detach().to(engine.device, dtype) for n in leaves}
    rest = ("targets", "reference_loss", "token_weight")
    made = {n: t.requires_grad_() for n, t in made.items()}
    return problem._replace(**made, **{n: getattr(problem, n).to(engine.device) for n in rest})


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
    ).loss
    return loss, torch.autograd.grad(loss, leaves, torch.tensor(upstream).to(loss))


def assert_same(ours, exact, engine):
    torch.testing.assert_close(ours.double().cpu(), exact.double().cpu(), **engine.tolerance)


def assert_definition(problem, engine, use_bias=True, upstream=1.0, **head):
    """Loss and gradients of the engine are those of the reference in float64."""
    mine = placed(problem, engine)
    loss, grads = gradients(mine, engine.name, use_bias, upstream, **head)
    exact = problem._replace(
        **{
            n: getattr(mine, n).detach().double().cpu().requires_grad_()
            for n in ("hidden", "weight", "bias")
        }
    )
    expected_loss, expected = gradients(exact, "reference", use_bias, upstream, **head)
    assert_same(loss, expected_loss, engine)
    for a, b in zip(grads, expected, strict=True):
        assert_same(a, b, engine)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_values_and_gradients_are_the_definition(make_problem, engine, head, use_bias):
    assert_definition(make_problem(), engine, use_bias, **head)


@pytest.mark.parametrize("head", HEADS)
def test_per_token_values_are_the_definition(make_problem, engine, head):
    p = placed(make_problem(), engine)
    ours = token_cross_entropy(
        p.hidden, p.weight, p.targets, want_entropy=True, bias=p.bias, **engine.options(), **head
    )
    operands = (p.hidden.detach().double().cpu(), p.weight.detach().double().cpu())
    bias, targets = p.bias.detach().double().cpu(), p.targets.cpu()
    theirs = token_cross_entropy(
        *operands, targets, want_entropy=True, bias=bias, implementation="reference", **head
    )
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert a is not None and b is not None
        assert_same(a, b, engine)
    assert torch.equal(ours.correct.cpu(), theirs.correct)
    z = head.get("logit_scale", 1.0) * F.linear(*operands, bias)
    if "softcap" in head:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    valid = targets != -100
    assert_same(ours.lse[valid], z.logsumexp(1)[valid], engine)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_tokens=st.integers(0, 23),
    width=st.integers(1, 5),
    vocab_size=st.sampled_from([1, 2, 7, 8, 9, 31]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    unweighted=st.sampled_from([0.0, 0.5, 1.0]),
    cache_bytes=st.sampled_from([0, 0, 0, 700]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    make_problem, engine, num_tokens, width, vocab_size, ignored, unweighted, cache_bytes, seed
):
    p = make_problem(num_tokens, width, vocab_size, ignored=ignored, seed=seed)
    unweighted = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < unweighted
    p = p._replace(token_weight=p.token_weight.masked_fill(unweighted, 0))
    if cache_bytes:  # two-byte exponentials
        engine = engine._replace(tolerance={"rtol": 2e-3, "atol": 2e-3})
    mine = placed(p, engine)
    loss, grads = gradients(mine, engine.name, logits_cache_bytes=cache_bytes)
    exact = placed(p, Engine("", torch.float64, "cpu", {}))
    expected_loss, expected = gradients(exact, "reference")
    assert_same(loss, expected_loss, engine)
    for a, b in zip(grads, expected, strict=True):
        assert_same(a, b, engine)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("known", "cache_bytes"), [(True, 0), (False, 0), (False, FULL_CACHE)])
def test_gradcheck(make_problem, head, known, cache_bytes, monkeypatch):
    monkeypatch.setattr(chunked, "_tile_shape", lambda device: (5, 8))
    if not known:
        forget_known_weights(monkeypatch)
    p = make_problem(num_tokens=11, width=3, vocab_size=10)

    def loss(hidden, weight, bias):
        return weighted_cross_entropy(
            hidden,
            weight,
            p.targets,
            p.token_weight,
            bias=bias,
            denominator=1.7,
            logits_cache_bytes=cache_bytes,
            implementation="chunked",
            **head,
        ).loss

    assert torch.autograd.gradcheck(loss, (p.hidden, p.weight, p.bias))


@pytest.mark.parametrize("upstream", [-2.5, 0.0, 1e-3, 1e4])
def test_upstream_gradient(make_problem, engine, upstream):
    engine = engine._replace(tolerance={"rtol": 2e-5, "atol": 5e-6 * max(1, abs(upstream))})
    assert_definition(make_problem(), engine, upstream=upstream)


def test_nonzero_weights_of_both_signs_scale_each_token(make_problem, engine):
    # One token at a time: a non-uniform weight that reached another token's row would show.
    p = make_problem(num_tokens=6, ignored=0.0)
    for i in range(6):
        alone = p._replace(token_weight=torch.zeros(6).index_fill(0, torch.tensor([i]), -0.5 - i))
        assert_definition(alone, engine)


def relative_error(value, exact):
    return ((value.double().cpu() - exact).norm() / exact.norm()).item()


SAME_DTYPE = [
    (torch.float32, 0),  # with a cache: see the next test
    (torch.bfloat16, 0),
    (torch.bfloat16, FULL_CACHE),
    (torch.float16, 0),
    (torch.float16, FULL_CACHE),
]


@pytest.mark.parametrize(("dtype", "cache_bytes"), SAME_DTYPE)
def test_loses_no_more_than_torch_in_the_same_dtype(
    make_problem, engine, dtype, cache_bytes, monkeypatch
):
    monkeypatch.setattr(chunked, "_tile_shape", lambda device: (64, 96))
    interpreted = engine.name == "triton" and engine.device == "cpu"
    shape = (61, 32, 120) if interpreted else (257, 64, 401)
    p = placed(make_problem(*shape), engine, dtype)
    exact = placed(p, Engine("", torch.float64, "cpu", {}))
    loss, ours = gradients(p, engine.name, logits_cache_bytes=cache_bytes)
    exact_loss, expected = gradients(exact, "reference")
    z = F.linear(p.hidden, p.weight, p.bias)
    torch_losses = F.cross_entropy(z, p.targets, reduction="none").double()
    torch_loss = (torch_losses * p.token_weight).sum() / 3
    theirs = torch.autograd.grad(torch_loss, (p.hidden, p.weight, p.bias))
    allowed = abs(torch_loss.cpu() - exact_loss).item() + 1e-6 * abs(exact_loss).item()
    assert abs(loss.double().cpu() - exact_loss).item() <= 1.25 * allowed
    # The interpreter rounds bfloat16 towards zero, twice the error of rounding to the nearest.
    factor = 2.5 if interpreted and dtype == torch.bfloat16 else 1.25
    for name, a, b, c in zip(("hidden", "weight", "bias"), ours, theirs, expected, strict=True):
        assert a.dtype == dtype
        # numpy's products in the interpreter add in another order than torch's
        slack = 2e-7 if interpreted and dtype == torch.float32 else 0
        assert relative_error(a, c) <= factor * relative_error(b, c) + slack, name


@pytest.mark.parametrize("head", HEADS)
def test_cached_gradients_are_right_to_the_rounding_of_the_cache(make_problem, engine, head):
    p = make_problem(num_tokens=30, width=16, vocab_size=70)
    exact = placed(p, Engine("", torch.float64, "cpu", {}))
    mine = placed(p, engine)
    plain_loss, _ = gradients(mine, engine.name, **head)
    _, expected = gradients(exact, "reference", **head)
    block = 30 * (8 * engine.dtype.itemsize + 8)
    for cache_bytes in (block, 3 * block, FULL_CACHE):  # none, some or all of the columns
        loss, grads = gradients(mine, engine.name, logits_cache_bytes=cache_bytes, **head)
        assert torch.equal(loss, plain_loss)
        for a, b in zip(grads, expected, strict=True):
            assert relative_error(a, b) < 5e-4


def test_bfloat16_losses_come_from_float32_accumulators(make_problem, engine):
    p = placed(make_problem(num_tokens=60, width=64, vocab_size=100), engine, torch.bfloat16)
    loss = token_cross_entropy(p.hidden, p.weight, p.targets, **engine.options()).loss
    z = p.hidden.detach().double() @ p.weight.detach().double().T
    exact = F.cross_entropy(z, p.targets, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, atol=1e-4, rtol=1e-5)
    assert (loss >= 0).all()


def one_row(z, target, engine):
    """Logits as the head of a one-dimensional hidden state."""
    weight = torch.tensor(z, device=engine.device)[:, None]
    hidden = torch.ones(1, 1, device=engine.device).requires_grad_()
    targets = torch.tensor([target], device=engine.device)
    return hidden, weight.requires_grad_(), targets, hidden.new_ones(1)


def test_confident_token_keeps_its_digits(engine):
    # p = 1 - 4e-6: the gradient at the target must agree with the loss, and not be rounded to 0.
    row = one_row([13.0, 0.5, *[-30.0] * 9], 0, engine)
    loss = weighted_cross_entropy(*row, **engine.options()).loss
    loss.backward()
    weight = row[1]
    z = weight.detach().double()[:, 0]
    exact = (z[1:] - z[0]).exp().sum().log1p().item()
    assert weight.grad is not None
    assert loss.item() == pytest.approx(exact, rel=1e-1)
    assert weight.grad[0, 0].item() == pytest.approx(math.expm1(-loss.item()), rel=1e-5)
    assert loss.item() > 0


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("cache_bytes", [0, FULL_CACHE])
def test_huge_logits(engine, size, softcap, cache_bytes):
    z = (torch.linspace(-1, 1, 20) * size).tolist()
    results = []
    definition = engine._replace(name="reference")
    for options in (engine.options(), definition.options()):
        row = one_row(z, 7, engine)
        loss = weighted_cross_entropy(
            *row, softcap=softcap, logits_cache_bytes=cache_bytes, **options
        ).loss
        results.append((loss, *torch.autograd.grad(loss, row[:2])))
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-3 if cache_bytes else 1e-5, atol=1e-5)


def test_huge_close_logits_lose_nothing_to_a_rounded_lse(engine):
    z = [10000.0, 10000.5, 9999.25, *[0.0] * 10]
    row = one_row(z, 0, engine)
    weighted_cross_entropy(*row, **engine.options()).loss.backward()
    expected = torch.tensor(z, dtype=torch.float64).softmax(0)
    expected[0] -= 1
    assert row[1].grad is not None
    grad = row[1].grad[:, 0].double().cpu()
    torch.testing.assert_close(grad, expected, atol=1e-7, rtol=1e-6)


def test_equal_logits_have_log_vocabulary_loss_and_entropy(engine):
    scores = token_cross_entropy(
        *one_row([2.0] * 19, 11, engine)[:3], want_entropy=True, **engine.options()
    )
    assert scores.entropy is not None
    assert scores.loss.item() == pytest.approx(math.log(19), rel=1e-6)
    assert scores.entropy.item() == pytest.approx(math.log(19), rel=1e-6)


def test_impossible_words_take_part_in_nothing(engine):
    p = torch.tensor([0.5, 0.25, 0.25])
    bias = torch.full((12,), -torch.inf)
    bias[[0, 5, 11]] = p.log()
    bias = bias.to(engine.device)
    zero = (bias.new_zeros(1, 2), bias.new_zeros(12, 2))
    target = lambda word: torch.tensor([word], device=engine.device)  # noqa: E731
    options = engine.options()
    scores = token_cross_entropy(*zero, target(5), want_entropy=True, bias=bias, **options)
    assert scores.entropy is not None
    assert scores.loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert scores.entropy.item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    impossible = token_cross_entropy(*zero, target(3), bias=bias, **options)
    assert impossible.loss.item() == math.inf


@pytest.mark.parametrize("impossible", [range(8), range(8, 16)])
@pytest.mark.parametrize("cache_bytes", [0, FULL_CACHE])
def test_a_whole_tile_of_impossible_words(make_problem, engine, impossible, cache_bytes):
    p = make_problem(ignored=0.0)
    with torch.no_grad():
        p.bias[list(impossible)] = -torch.inf
    p = p._replace(targets=p.targets.where(p.bias[p.targets].isfinite(), 28))
    if cache_bytes:  # two-byte exponentials
        engine = engine._replace(tolerance={"rtol": 2e-3, "atol": 2e-3})
    loss, grads = gradients(placed(p, engine), engine.name, logits_cache_bytes=cache_bytes)
    exact = placed(p, Engine("", torch.float64, "cpu", {}))
    expected_loss, expected = gradients(exact, "reference")
    assert expected_loss.isfinite()
    assert_same(loss, expected_loss, engine)
    for a, b in zip(grads, expected, strict=True):
        assert_same(a, b, engine)


def test_no_possible_word_at_all_is_no_finite_loss(engine):
    bias = torch.full((12,), -torch.inf, device=engine.device)
    hidden, weight = bias.new_zeros(1, 1).to(engine.dtype), bias.new_zeros(12, 1).to(engine.dtype)
    target = torch.tensor([3], device=engine.device)
    loss = token_cross_entropy(
        hidden, weight, target, bias=bias.to(engine.dtype), **engine.options()
    ).loss
    assert not loss.isfinite()


@pytest.mark.parametrize("places", [(3, 4), (3, 12), (7, 8), (0, 18)])
@pytest.mark.parametrize("implementation", ["chunked", "reference", "triton"])
def test_correct_is_the_lowest_index_of_the_maximum(places, implementation, monkeypatch):
    # Two equal maxima, in one tile or in two (tiles are eight wide).
    monkeypatch.setattr(chunked, "_tile_shape", lambda device: (5, 8))
    device = device_of(implementation)
    z = torch.zeros(19, device=device)
    z[list(places)] = 3.0
    scores = token_cross_entropy(
        torch.ones(19, 1, device=device),
        z[:, None],
        torch.arange(19, device=device),
        implementation=implementation,
    )
    assert scores.correct.nonzero().squeeze(1).tolist() == [places[0]]


def test_duplicated_rows_have_equal_losses_and_gradients(make_problem, engine):
    p = make_problem(num_tokens=12, ignored=0.0)
    double = p._replace(
        hidden=torch.cat([p.hidden, p.hidden]),
        targets=torch.cat([p.targets, p.targets]),
        token_weight=torch.cat([p.token_weight, p.token_weight]),
    )
    _, (grad_hidden, grad_weight, _) = gradients(placed(double, engine), engine.name)
    _, (_, single, _) = gradients(placed(p, engine), engine.name)
    assert_same(grad_hidden[:12], grad_hidden[12:], engine)
    assert_same(grad_weight, 2 * single, engine)


def test_rows_without_weight_are_exactly_zero_and_reach_nothing(make_problem, engine):
    p = make_problem()
    silent = torch.arange(37) % 3 == 0
    p = p._replace(token_weight=p.token_weight.masked_fill(silent, 0))
    _, (grad_hidden, *others) = gradients(placed(p, engine), engine.name)
    assert (grad_hidden[silent.to(engine.device)] == 0).all()
    moved = torch.where(silent[:, None], 50 * p.hidden.detach() + 3, p.hidden.detach())
    moved_problem = placed(p._replace(hidden=moved), engine)
    _, (moved_grad, *moved_others) = gradients(moved_problem, engine.name)
    assert torch.equal(moved_grad, grad_hidden)
    assert all(torch.equal(a, b) for a, b in zip(others, moved_others, strict=True))


@pytest.mark.parametrize("max_rows", [None, 37, 36])
def test_ignored_rows_may_hold_anything(make_problem, engine, max_rows):
    p = make_problem()
    hole = p.targets == -100
    broken = p._replace(hidden=p.hidden.detach().masked_fill(hole[:, None], torch.nan))
    loss, grads = gradients(placed(broken, engine), engine.name, max_rows=max_rows)
    expected_loss, expected = gradients(p, "reference")
    assert_same(loss, expected_loss, engine)
    for a, b in zip(grads, expected, strict=True):
        assert_same(a, b, engine)


def test_capacity_above_the_number_of_rows_changes_nothing(make_problem, engine):
    p = placed(make_problem(), engine)
    live = int(((p.token_weight != 0) & (p.targets != -100)).sum())
    _, expected = gradients(p, engine.name)
    for max_rows in (live, live + 1, 1000):
        _, grads = gradients(p, engine.name, max_rows=max_rows)
        for a, b in zip(grads, expected, strict=True):
            assert_same(a, b, engine)
    if engine.device == "cpu":
        with pytest.raises(ValueError, match=f"max_rows is {live - 1}, more tokens have a weight"):
            gradients(p, engine.name, max_rows=live - 1)


def test_bitwise_repeatable(make_problem, engine):
    p = placed(make_problem(num_tokens=29, width=33, vocab_size=70), engine, torch.float32)
    first = gradients(p, engine.name)
    for _ in range(2):
        again = gradients(p, engine.name)
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(a, b) for a, b in zip(again[1], first[1], strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_operand(make_problem, engine, frozen):
    p = placed(make_problem(), engine)
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    _, expected = gradients(make_problem(), "reference")
    wanted = dict(zip(leaves, expected, strict=True))
    leaves[frozen].requires_grad_(False)
    weighted_cross_entropy(
        p.hidden,
        p.weight,
        p.targets,
        p.token_weight,
        bias=p.bias,
        denominator=3.0,
        **engine.options(),
    ).loss.backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            assert_same(leaf.grad, wanted[name], engine)


def test_strided_operands(make_problem, engine):
    p = placed(make_problem(), engine)
    hidden = p.hidden.detach().T.contiguous().T.requires_grad_()
    weight = torch.stack([p.weight.detach(), p.weight.detach()], dim=2)[..., 0].requires_grad_()
    bias = torch.stack([p.bias.detach(), p.bias.detach()], dim=1)[:, 0].requires_grad_()
    _, expected = gradients(make_problem(), "reference")
    strided = p._replace(hidden=hidden, weight=weight, bias=bias)
    for a, b in zip(gradients(strided, engine.name)[1], expected, strict=True):
        assert_same(a, b, engine)


def test_backward_twice_with_a_retained_graph(make_problem, engine):
    p = placed(make_problem(), engine)
    loss = weighted_cross_entropy(
        p.hidden, p.weight, p.targets, p.token_weight.abs(), **engine.options()
    ).loss
    first = torch.autograd.grad(loss, (p.hidden, p.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (p.hidden, p.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_repeated_backwards_accumulate_exactly(make_problem, engine):
    p = placed(make_problem(), engine)
    _, once = gradients(p, engine.name)
    for _ in range(2):
        loss = weighted_cross_entropy(
            p.hidden,
            p.weight,
            p.targets,
            p.token_weight,
            bias=p.bias,
            denominator=3.0,
            **engine.options(),
        ).loss
        loss.backward()
    for leaf, single in zip((p.hidden, p.weight, p.bias), once, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, 2 * single)


def test_a_second_derivative_is_refused(make_problem, engine):
    p = placed(make_problem(), engine)
    loss = weighted_cross_entropy(
        p.hidden, p.weight, p.targets, p.token_weight, **engine.options()
    ).loss
    (grad,) = torch.autograd.grad(loss, p.hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_weight_tied_to_the_embedding(make_problem, engine):
    p = placed(make_problem(), engine)
    tokens = torch.arange(37) % 29
    results = []
    for implementation in (engine.name, "reference"):
        weight = p.weight.detach().clone().requires_grad_()
        loss = weighted_cross_entropy(
            torch.tanh(weight[tokens]),
            weight,
            p.targets,
            p.token_weight,
            denominator=2.0,
            implementation=implementation,
        ).loss
        results.append(torch.autograd.grad(loss, weight)[0])
    assert_same(results[0], results[1], engine)


def test_gradient_changed_in_place_is_noticed(make_problem, engine):
    p = placed(make_problem(), engine)
    hidden = p.hidden * 1
    loss = weighted_cross_entropy(
        hidden, p.weight, p.targets, p.token_weight, **engine.options()
    ).loss
    (expected,) = torch.autograd.grad(loss, p.hidden, retain_graph=True)
    hidden.mul_(2)
    try:  # a gradient that was made in the forward pass has nothing to notice
        assert torch.equal(torch.autograd.grad(loss, p.hidden)[0], expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


def test_cache_is_a_budget(make_problem, engine):
    """What the forward pass keeps never exceeds it, and full columns of the head are used."""
    from slm_kernels import ops
    from slm_kernels.contracts import Head

    p = placed(make_problem(num_tokens=40, vocab_size=70), engine)
    targets = p.targets.masked_fill(p.targets < 0, -1)
    sizes = []
    for budget in (0, 1, 2000, 4000, 10**6):
        head = Head(p.weight.detach(), None, 1.0, None)
        *_, exps, offset = ops.token_stats(
            p.hidden.detach(), head, targets, False, False, budget, engine.name
        )
        assert exps.nbytes + offset.nbytes <= budget
        sizes.append(exps.shape[1])
    assert sizes[0] == sizes[1] == 0 and sizes[-1] == 70 and sizes == sorted(sizes)


def test_no_cache_is_kept_where_nothing_is_trained(make_problem, engine, monkeypatch):
    from slm_kernels import ops

    budgets = []
    token_stats = ops.token_stats

    def seen(*arguments):
        budgets.append(arguments[5])
        return token_stats(*arguments)

    monkeypatch.setattr(ops, "token_stats", seen)
    forget_known_weights(monkeypatch)
    p = placed(make_problem(), engine)
    options = {"logits_cache_bytes": 5000} | engine.options()
    weighted_cross_entropy(p.hidden, p.weight, p.targets, p.token_weight, **options)
    with torch.no_grad():
        weighted_cross_entropy(p.hidden, p.weight, p.targets, p.token_weight, **options)
    assert budgets == [5000, 0]
