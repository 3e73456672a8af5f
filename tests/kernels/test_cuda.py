"""What only a GPU can show: no waiting for the device, graphs, memory, shapes past 32 bits.

`make gpu-check` runs this with test_implementations.py and test_ops.py, whose Triton cases then run
on the GPU as well.
"""

import math

import pytest
import torch

from slm_kernels import backward, selective_cross_entropy, weighted_cross_entropy

pytestmark = pytest.mark.gpu


def make(num_tokens: int, width: int, vocab_size: int, dtype=torch.bfloat16, seed: int = 0):
    random = torch.Generator("cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=random, device="cuda")  # noqa: E731
    targets = torch.randint(vocab_size, (num_tokens,), generator=random, device="cuda")
    targets[::7] = -100
    return (
        normal(num_tokens, width).to(dtype).requires_grad_(),
        (normal(vocab_size, width) * 2 * width**-0.5).to(dtype).requires_grad_(),
        targets,
        normal(num_tokens).abs() * 3,
    )


def gradients(problem, implementation="triton", **options):
    out = selective_cross_entropy(*problem, implementation=implementation, **options)
    return out, torch.autograd.grad(out.loss, problem[:2])


def relative_error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


# Odd widths, prime vocabularies, one row, one word, the largest vocabulary in use.
SHAPES = [(1, 64, 100), (300, 72, 1009), (513, 130, 32003), (64, 128, 262144), (40, 16, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cache_bytes", [0, 2**40])
def test_triton_agrees_with_chunked(shape, dtype, cache_bytes):
    problem = make(*shape, dtype=dtype)
    ours, grads = gradients(problem, select_ratio=0.6, logits_cache_bytes=cache_bytes)
    theirs, expected = gradients(problem, "chunked", select_ratio=0.6)
    torch.testing.assert_close(ours.token_loss, theirs.token_loss, rtol=1e-4, atol=1e-4)
    assert ours.num_selected == theirs.num_selected
    allowed = 1e-5 if dtype == torch.float32 and not cache_bytes else 1e-2
    if torch.equal(ours.selected, theirs.selected):  # rounding may swap two close scores
        assert all(relative_error(a, b) < allowed for a, b in zip(grads, expected, strict=True))
    assert (ours.selected ^ theirs.selected).sum() <= 2


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("cache_bytes", [0, 2**40])
@pytest.mark.parametrize("denominator", [None, 100.0])
def test_nothing_waits_for_the_device(scope, cache_bytes, denominator):
    hidden, weight, targets, reference_loss = make(256, 64, 500)
    shaped = (hidden.view(4, 64, 64), weight, targets.view(4, 64), reference_loss.view(4, 64))
    options = {"select_ratio": 0.6, "scope": scope, "denominator": denominator}

    def step():
        out = selective_cross_entropy(*shaped, logits_cache_bytes=cache_bytes, **options)
        out.loss.backward()
        for token_weight in (shaped[3], lambda losses: (losses - shaped[3]).sigmoid()):
            weighted_cross_entropy(*shaped[:3], token_weight, max_rows=256).loss.backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_captured_in_a_graph():
    static = make(256, 64, 500)
    other = make(256, 64, 500, seed=1)
    expected, expected_grads = gradients(other, select_ratio=0.6)
    gradients(static, select_ratio=0.6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = gradients(static, select_ratio=0.6)
    with torch.no_grad():
        for mine, values in zip(static, other, strict=True):
            mine.copy_(values)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.selected, expected.selected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("vocab_size", [32000, 128256])
def test_peak_memory_is_the_formula(vocab_size):
    num_tokens, width, ratio = 8192, 1024, 0.5
    problem = make(num_tokens, width, vocab_size)
    gradients(problem, select_ratio=ratio)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, grads = gradients(problem, select_ratio=ratio)
    extra = torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in grads)
    rows = math.ceil(ratio * num_tokens)
    gathered = rows * width * (2 + 4)  # the rows, and their gradient in float32
    columns = min(backward.SLICE_COLUMNS[1], backward.SLICE_BYTES // (rows * 2))
    per_token = num_tokens * 64 * 4  # losses, scores, sorting, partial sums of the shares
    assert extra <= gathered + rows * columns * 2 + per_token


def test_more_logits_than_32_bits_can_count():
    problem = make(70_000, 64, 32_768)
    assert 70_000 * 32_768 > 2**31
    ours, grads = gradients(problem, select_ratio=0.5)
    theirs, _ = gradients(problem, "chunked", select_ratio=0.5)
    torch.testing.assert_close(ours.token_loss, theirs.token_loss, rtol=1e-4, atol=1e-4)
    full, cached = gradients(problem, select_ratio=0.5, logits_cache_bytes=2**40)
    assert torch.equal(full.selected, ours.selected)
    for a, b in zip(cached, grads, strict=True):
        assert relative_error(a, b) < 1e-2


def test_ten_runs_are_bitwise_equal():
    problem = make(1000, 128, 5003)
    first, expected = gradients(problem, select_ratio=0.6)
    for _ in range(9):
        out, grads = gradients(problem, select_ratio=0.6)
        assert torch.equal(out.token_loss, first.token_loss)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_triton_is_what_auto_takes():
    problem = make(64, 64, 100)
    auto, grads = gradients(problem, "auto", select_ratio=0.6)
    ours, expected = gradients(problem, select_ratio=0.6)
    assert torch.equal(auto.token_loss, ours.token_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
