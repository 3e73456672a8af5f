"""What an accelerator is asked for, shown without one: tensors of device "meta" have no values.

An operator that mixes devices raises, and so does whatever reads a value back: `.item()`,
`if tensor`, `nonzero`, boolean indices. Kernels are not launched: their values are
test_implementations.py's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from slm_kernels import (
    backward,
    forward,
    ops,
    selective_cross_entropy,
    tiles,
    token_cross_entropy,
    weighted_cross_entropy,
)

FULL_CACHE = 2**40
HEADS = [{}, {"logit_scale": 0.5, "softcap": 8.0}]


class Kernel:
    """Takes a launch, and does nothing."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> "Kernel":
        assert all(size > 0 for size in grid)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.launches += 1
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.fixture(autouse=True)
def kernels(monkeypatch) -> dict[str, Kernel]:
    found = {"stats": Kernel(), "gradient": Kernel(), "cached": Kernel()}
    monkeypatch.setattr(forward, "_stats_kernel", found["stats"])
    monkeypatch.setattr(backward, "_gradient_kernel", found["gradient"])
    monkeypatch.setattr(backward, "_cached_gradient_kernel", found["cached"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for module in (forward, backward, tiles):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    if not has_meta_product():
        monkeypatch.setattr(backward, "_add_product", lambda total, gradient, weight: None)
    return found


def has_meta_product() -> bool:
    """torch 2.11's decomposition of addmm, which CUDA does not run, takes the dtype for beta."""
    total, half = torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta").half()
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except TypeError:
        return False
    return True


def problem(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(4, 64) tokens, width 64, 500 words."""
    make = lambda *shape: torch.empty(shape, device="meta", dtype=dtype)  # noqa: E731
    targets = torch.empty(4, 64, dtype=torch.int64, device="meta")
    reference_loss = torch.empty(4, 64, device="meta")
    return make(4, 64, 64).requires_grad_(), make(500, 64).requires_grad_(), targets, reference_loss


def assert_gradients(hidden: Tensor, weight: Tensor) -> None:
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("select_ratio", [0.3, 1.0])
@pytest.mark.parametrize("cache_bytes", [0, FULL_CACHE])
@pytest.mark.parametrize("denominator", [None, 100.0, "tensor"])
@pytest.mark.parametrize("head", HEADS)
def test_selective_step_stays_on_the_device(scope, select_ratio, cache_bytes, denominator, head):
    hidden, weight, targets, reference_loss = problem()
    if denominator == "tensor":
        denominator = torch.empty((), device="meta")
    out = selective_cross_entropy(
        hidden,
        weight,
        targets,
        reference_loss,
        select_ratio=select_ratio,
        scope=scope,
        logits_cache_bytes=cache_bytes,
        denominator=denominator,
        implementation="triton",
        **head,
    )
    out.loss.backward()
    assert_gradients(hidden, weight)


@pytest.mark.parametrize("how", ["tensor", "function"])
def test_weighted_step_stays_on_the_device(how):
    hidden, weight, targets, reference_loss = problem()
    made = reference_loss if how == "tensor" else lambda loss: (loss - reference_loss).sigmoid()
    out = weighted_cross_entropy(
        hidden, weight, targets, made, max_rows=256, implementation="triton"
    )
    out.loss.backward()
    assert_gradients(hidden, weight)


def test_scores_stay_on_the_device():
    hidden, weight, targets, _ = problem()
    scores = token_cross_entropy(
        hidden, weight, targets, want_entropy=True, implementation="triton"
    )
    assert all(value is not None and value.shape == (4, 64) for value in scores)


def stats(dtype: torch.dtype, cache_bytes: int, head: dict[str, float], made: bool = True) -> Any:
    """Inputs of the operator, and what its body makes of them; or what it promises to."""
    hidden, weight, targets, _ = problem(dtype)
    rows = (hidden.detach().view(-1, 64), weight.detach(), None, targets.view(-1))
    operator = ops._token_stats._init_fn if made else ops._token_stats
    shape = (head.get("logit_scale", 1.0), head.get("softcap"))
    return rows, operator(*rows, *shape, True, True, cache_bytes, "triton")


def describe(tensors: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.device, t.stride()) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cache_bytes", [0, 40_000, FULL_CACHE])
@pytest.mark.parametrize("head", HEADS)
def test_bodies_ask_for_no_value_and_keep_their_promise(dtype, cache_bytes, head, kernels):
    rows, found = stats(dtype, cache_bytes, head)
    assert describe(found) == describe(stats(dtype, cache_bytes, head, made=False)[1])
    assert kernels["stats"].launches == 1
    upstream, token_weight = torch.empty((), device="meta"), torch.empty(256, device="meta")
    loss, row_max, sum_exp, _, _, *cache = found
    arguments = (upstream, *rows, token_weight, loss, row_max, sum_exp, *cache)
    options = (head.get("logit_scale", 1.0), head.get("softcap"), 154, [True, True, False])
    made = ops._head_gradients._init_fn(*arguments, *options, "triton")
    assert describe(made) == describe(ops._head_gradients(*arguments, *options, "triton"))
    assert kernels["gradient"].launches + kernels["cached"].launches > 0
    assert (kernels["cached"].launches > 0) == (cache[0].numel() > 0)


def test_a_value_read_back_is_noticed():
    """Without `max_rows` the number of rows is read from the device, as it is documented."""
    rows, found = stats(torch.bfloat16, 0, {})
    loss, row_max, sum_exp, _, _, *cache = found
    ones = torch.empty((), device="meta"), torch.empty(256, device="meta")
    with pytest.raises(NotImplementedError, match="nonzero"):
        ops._head_gradients._init_fn(
            ones[0], *rows, ones[1], loss, row_max, sum_exp, *cache, 1.0, None, ops.DYNAMIC,
            [True, True, False], "triton",
        )  # fmt: skip


@pytest.mark.parametrize("adds_to_float32", [True, False])
def test_products_of_two_byte_operands_are_summed_in_float32(adds_to_float32, monkeypatch):
    """Both ways to say so are torch's; the second is that of versions before 2.11."""
    if not has_meta_product():
        pytest.skip("this torch's addmm cannot run on device meta")
    monkeypatch.setattr(backward, "ADDS_TO_FLOAT32", adds_to_float32)
    half = torch.empty(4, 4, device="meta", dtype=torch.bfloat16)
    backward._add_product(torch.empty(4, 4, device="meta"), half, half)
