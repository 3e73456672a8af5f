"""The implementations as operators of torch: a compiled model keeps them whole, in one graph.

`token_stats` has no gradient; `weighted_sum` has one, computed by `head_gradients`. An empty tensor
stands for an absent one, since the operators' outputs cannot be None. "auto" is decided before.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from slm_kernels import chunked
from slm_kernels.contracts import (
    Head,
    HeadGradients,
    LogitsCache,
    TokenStats,
    compute_dtype,
    new_cache,
)
from slm_kernels.rows import weighted_rows

logger = logging.getLogger("slm_kernels")
DYNAMIC = -1  # a capacity that is read back from the device


@cache
def say_once(implementation: str, device_type: str) -> None:
    logger.info("cross-entropy on %s runs the implementation %r", device_type, implementation)


def _triton() -> Any:
    """The kernels, imported on first use: `import slm_kernels` needs torch alone."""
    from slm_kernels import triton_kernels

    return triton_kernels


def _engine(implementation: str) -> Any:
    return chunked if implementation == "chunked" else _triton()


@custom_op("slm_kernels::token_stats", mutates_args=())
def _token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    want_entropy: bool,
    want_correct: bool,
    cache_bytes: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    say_once(implementation, hidden.device.type)
    engine = _engine(implementation)
    cache = new_cache(hidden, len(weight), cache_bytes, engine.cache_block(hidden))
    head = Head(weight, bias, logit_scale, softcap)
    stats = engine.token_stats(hidden, head, targets, want_entropy, want_correct, cache)
    entropy = stats.loss.new_empty(0) if stats.entropy is None else stats.entropy
    correct = targets.new_empty(0, dtype=torch.bool) if stats.correct is None else stats.correct
    return stats.loss, stats.row_max, stats.sum_exp, entropy, correct, cache.exps, cache.offset


@_token_stats.register_fake
def _(
    hidden, weight, bias, targets, logit_scale, softcap, want_entropy, want_correct, cache_bytes,
    implementation,
):  # fmt: skip
    dtype = compute_dtype(hidden)
    column = lambda size, dtype=dtype: hidden.new_empty(size, dtype=dtype)  # noqa: E731
    cache = new_cache(hidden, len(weight), cache_bytes, _engine(implementation).cache_block(hidden))
    N = len(targets)
    entropy = column(N if want_entropy else 0)
    correct = column(N if want_correct else 0, torch.bool)
    return column(N), column(N), column(N), entropy, correct, cache.exps, cache.offset


@custom_op("slm_kernels::head_gradients", mutates_args=())
def _head_gradients(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor,
    loss: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    cache_exps: Tensor,
    cache_offset: Tensor,
    logit_scale: float,
    softcap: float | None,
    capacity: int,
    wanted: list[bool],
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    engine = _engine(implementation)
    head = Head(weight, bias, logit_scale, softcap)
    rows = weighted_rows(
        upstream * logit_scale, targets, token_weight, loss, row_max, sum_exp, softcap,
        None if capacity == DYNAMIC else capacity,
    )  # fmt: skip
    cache = LogitsCache(cache_exps, cache_offset, engine.cache_block(hidden))
    found: HeadGradients = engine.head_gradients(hidden, head, rows, cache, tuple(wanted))
    none = hidden.new_empty(0)
    return tuple(none.clone() if gradient is None else gradient for gradient in found)  # type: ignore[return-value]


@_head_gradients.register_fake
def _(
    upstream, hidden, weight, bias, targets, token_weight, loss, row_max, sum_exp, cache_exps,
    cache_offset, logit_scale, softcap, capacity, wanted, implementation,
):  # fmt: skip
    like = (hidden, weight, hidden if bias is None else bias)
    return tuple(
        tensor.new_empty(tensor.shape) if want else hidden.new_empty(0)
        for tensor, want in zip(like, wanted, strict=True)
    )


@custom_op("slm_kernels::weighted_sum", mutates_args=())
def _weighted_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor,
    loss: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    cache_exps: Tensor,
    cache_offset: Tensor,
    logit_scale: float,
    softcap: float | None,
    capacity: int,
    implementation: str,
) -> Tensor:
    return (token_weight * loss).sum()


@_weighted_sum.register_fake
def _(
    hidden, weight, bias, targets, token_weight, loss, row_max, sum_exp, cache_exps, cache_offset,
    logit_scale, softcap, capacity, implementation,
):  # fmt: skip
    return loss.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.logit_scale, ctx.softcap, ctx.capacity, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, *per_token = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
    found = _head_gradients(
        upstream, hidden, weight, bias, *per_token, ctx.logit_scale, ctx.softcap, ctx.capacity,
        wanted, ctx.implementation,
    )  # fmt: skip
    gradients = [one if want else None for one, want in zip(found, wanted, strict=True)]
    return (*gradients, *[None] * 11)


_weighted_sum.register_autograd(_backward, setup_context=_save)


@custom_op("slm_kernels::known_sum", mutates_args=())
def _known_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor,
    logit_scale: float,
    softcap: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum, loss, row_max, sum_exp, and the gradients of the sum, made at once."""
    say_once("chunked", hidden.device.type)
    head = Head(weight, bias, logit_scale, softcap)
    wants = (wanted[0], wanted[1], wanted[2])
    stats, found = chunked.sum_and_gradients(hidden, head, targets, token_weight, wants)
    gradients = [hidden.new_empty(0) if one is None else one for one in found]
    local_sum = (token_weight * stats.loss).sum()
    return local_sum, stats.loss, stats.row_max, stats.sum_exp, *gradients  # type: ignore[return-value]


@_known_sum.register_fake
def _(hidden, weight, bias, targets, token_weight, logit_scale, softcap, wanted):
    column = lambda: hidden.new_empty(len(targets))  # noqa: E731
    like = (hidden, weight, hidden if bias is None else bias)
    gradients = (
        tensor.new_empty(tensor.shape) if want else hidden.new_empty(0)
        for tensor, want in zip(like, wanted, strict=True)
    )
    return hidden.new_empty(()), column(), column(), column(), *gradients


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the outputs that have none, as large as they are
    ctx.save_for_backward(*output[4:])


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    pairs = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    return (*(one * upstream if want else None for one, want in pairs), *[None] * 5)


_known_sum.register_autograd(_scale_gradients, setup_context=_save_gradients)


def known_sum(
    hidden: Tensor,  # (N, D), float32 or float64
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
) -> tuple[Tensor, TokenStats]:
    """Differentiable sum of token_weight * token_loss, in one pass: the weights are known."""
    operands = (hidden, head.weight, head.bias)
    wanted = [tensor is not None and tensor.requires_grad for tensor in operands]
    local_sum, loss, row_max, sum_exp, *_ = _known_sum(
        *operands, targets, token_weight, head.logit_scale, head.softcap, wanted
    )
    return local_sum, TokenStats(loss, row_max, sum_exp, None, None)


@custom_op("slm_kernels::refuse", mutates_args=())
def _refuse(keep: Tensor, wrong: Tensor, values: Tensor, message: str) -> Tensor:
    if wrong.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~wrong.any(), message)
    elif wrong.any():
        worst = values[wrong]
        raise ValueError(f"{message}, got {len(worst)} others, the first {worst[0].item()}")
    return keep.clone()


@_refuse.register_fake
def _(keep, wrong, values, message):
    return torch.empty_like(keep)


def refuse(keep: Tensor, wrong: Tensor, values: Tensor, message: str) -> Tensor:
    """`keep`; ValueError where anything is wrong. Use what it returns: that ties it to the graph.

    On a CPU the error is raised at once, elsewhere it is a device assertion, which needs no host
    synchronisation.
    """
    return _refuse(keep, wrong, values, message)


def token_stats(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    want_entropy: bool,
    want_correct: bool,
    cache_bytes: int,
    implementation: str,
) -> tuple[TokenStats, Tensor, Tensor]:  # and the logits cache
    loss, row_max, sum_exp, entropy, correct, exps, offset = _token_stats(
        hidden, head.weight, head.bias, targets, head.logit_scale, head.softcap, want_entropy,
        want_correct, cache_bytes, implementation,
    )  # fmt: skip
    stats = TokenStats(
        loss, row_max, sum_exp, entropy if want_entropy else None, correct if want_correct else None
    )
    return stats, exps, offset


def weighted_sum(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    stats: TokenStats,
    cache: tuple[Tensor, Tensor],
    capacity: int | None,
    implementation: str,
) -> Tensor:  # ()
    """Differentiable sum of token_weight * token_loss, from a forward pass already made."""
    return _weighted_sum(
        hidden, head.weight, head.bias, targets, token_weight,
        stats.loss, stats.row_max, stats.sum_exp, *cache,
        head.logit_scale, head.softcap, DYNAMIC if capacity is None else capacity, implementation,
    )  # fmt: skip
