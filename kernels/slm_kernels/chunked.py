"""Torch on any device, in memory bounded by one tile of logits: the N x V logits never exist.

The forward pass walks over tiles (rows x a slice of the vocabulary) and keeps three numbers a
token. The backward pass gathers the rows with a weight, computes their logits again, tile by tile,
and writes each slice of the weight's gradient once:

    G = (softmax(z) - onehot) * scale    grad_weight[slice] = G.T @ hidden    grad_hidden += G @ W

Matrix work: 2 NVD forward and 6 KVD backward for K rows with a weight; autograd needs 6 NVD.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from slm_kernels.reference import Head, TokenStats, compute_dtype

EXP_IS_ZERO = -1000.0  # exp of it is exactly 0 in float32 and float64, and 0 * it is not NaN


def _tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries of a tile. On a CPU it stays in the caches (4 MiB of float32)."""
    return (1024, 1024) if device.type == "cpu" else (8192, 8192)


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Even blocks of at most `size` rows: a narrow last one would waste its matrix products."""
    if num_rows:
        even = math.ceil(num_rows / math.ceil(num_rows / size))
        yield from (slice(i, min(i + even, num_rows)) for i in range(0, num_rows, even))


class _Slice(NamedTuple):
    start: int
    weight: Tensor  # (v, D), in the compute dtype
    bias: Tensor | None  # (v,)

    def of(self, gradient: Tensor) -> Tensor:
        return gradient[self.start : self.start + len(self.weight)]


def _vocabulary_slices(head: Head, dtype: torch.dtype) -> Iterator[_Slice]:
    _, columns = _tile_shape(head.weight.device)
    for start in range(0, head.weight.shape[0], columns):
        stop = start + columns
        bias = None if head.bias is None else head.bias[start:stop].to(dtype)
        yield _Slice(start, head.weight[start:stop].to(dtype), bias)


def _tile_buffer(head: Head, num_rows: int, dtype: torch.dtype) -> Tensor:
    rows, columns = _tile_shape(head.weight.device)
    size = min(rows, num_rows) * min(columns, head.weight.shape[0])
    return torch.empty(size, dtype=dtype, device=head.weight.device)


def _tile_logits(
    block: Tensor,  # (R, D)
    part: _Slice,
    head: Head,
    buffer: Tensor,  # at least R * v elements
) -> Tensor:  # (R, v), in the buffer
    # Only out= and in-place products in this file: autocast leaves those in float32.
    shape = (block.shape[0], part.weight.shape[0])
    z = buffer[: shape[0] * shape[1]].view(shape)
    scale = head.logit_scale
    if part.bias is None:
        torch.addmm(z, block, part.weight.T, beta=0, alpha=scale, out=z)
    else:
        torch.addmm(part.bias, block, part.weight.T, beta=scale, alpha=scale, out=z)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z


def _targets_inside(
    targets: Tensor,  # (R,)
    start: int,
    size: int,
) -> tuple[Tensor, Tensor]:  # (r,), (r,)
    """The rows whose target lies in the slice, and its column there."""
    rows = ((targets >= start) & (targets < start + size)).nonzero().squeeze(1)
    return rows, targets[rows] - start


def stats_of_tiles(
    tiles: Iterable[tuple[int, Tensor]],  # (start, (R, v)) in vocabulary order; overwritten
    targets: Tensor,  # (R,), all valid
    dtype: torch.dtype,
    want_entropy: bool,
) -> TokenStats:
    row_max = torch.full_like(targets, torch.finfo(dtype).min, dtype=dtype)
    target_logit, sum_exp, sum_exp_z = (torch.zeros_like(row_max) for _ in range(3))
    correct = torch.ones_like(targets, dtype=torch.bool)
    for start, z in tiles:
        tile_max = z.amax(dim=1)
        rows, column = _targets_inside(targets, start, z.shape[1])
        target_logit[rows] = z[rows, column]
        # The target is the first maximum if it is the first of its own tile, beats every tile
        # before, and is beaten by none after.
        correct &= tile_max <= row_max
        correct[rows] = (z[rows].argmax(dim=1) == column) & (tile_max > row_max)[rows]

        new_max = torch.maximum(row_max, tile_max)
        drop = (row_max - new_max).clamp_(min=EXP_IS_ZERO)
        z.sub_(new_max[:, None])
        shifted = z.clamp(min=EXP_IS_ZERO) if want_entropy else None
        z.exp_()
        if shifted is not None:
            sum_exp_z = (sum_exp_z + drop * sum_exp) * drop.exp() + shifted.mul_(z).sum(dim=1)
        sum_exp = sum_exp * drop.exp() + z.sum(dim=1)
        row_max = new_max
    log_sum = sum_exp.log()
    return TokenStats(
        loss=(row_max - target_logit) + log_sum,  # both terms >= 0
        row_max=row_max,
        sum_exp=sum_exp,
        entropy=(log_sum - sum_exp_z / sum_exp).clamp_(min=0) if want_entropy else None,
        correct=correct,
    )


def empty_stats(
    targets: Tensor,  # (N,)
    dtype: torch.dtype,
    want_entropy: bool,
) -> TokenStats:
    """What an ignored row has."""
    zero = torch.zeros_like(targets, dtype=dtype)
    entropy = torch.zeros_like(zero) if want_entropy else None
    correct = torch.zeros_like(targets, dtype=torch.bool)
    return TokenStats(zero, torch.zeros_like(zero), torch.ones_like(zero), entropy, correct)


def write_rows(stats: TokenStats, rows: Tensor, block: TokenStats) -> None:
    for column, values in zip(stats, block, strict=True):
        if column is not None and values is not None:
            column[rows] = values


def token_stats(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    want_entropy: bool,
) -> TokenStats:
    dtype = compute_dtype(hidden)
    stats = empty_stats(targets, dtype, want_entropy)
    buffer = _tile_buffer(head, len(targets), dtype)
    valid = (targets >= 0).nonzero().squeeze(1)
    for mine in row_blocks(len(valid), _tile_shape(hidden.device)[0]):
        rows = valid[mine]
        block = hidden.index_select(0, rows).to(dtype)
        tiles = (
            (part.start, _tile_logits(block, part, head, buffer))
            for part in _vocabulary_slices(head, dtype)
        )
        write_rows(stats, rows, stats_of_tiles(tiles, targets[rows], dtype, want_entropy))
    return stats


class WeightedRows(NamedTuple):
    """The K rows with a weight, and what their logit gradients are made of."""

    positions: Tensor  # (K,), among the N
    targets: Tensor  # (K,)
    row_max: Tensor  # (K,)
    scale: Tensor  # (K,), upstream gradient * token_weight / sum_exp
    at_target: Tensor  # (K,), (p - 1) * sum_exp, where p = exp(-loss)

    def part(self, mine: slice) -> "WeightedRows":
        return WeightedRows(*(column[mine] for column in self))


def rows_with_weight(
    upstream: Tensor,  # ()
    targets: Tensor,  # (N,)
    token_weight: Tensor,  # (N,)
    loss: Tensor,  # (N,)
    row_max: Tensor,  # (N,)
    sum_exp: Tensor,  # (N,)
) -> WeightedRows:
    kept = ((token_weight != 0) & (targets >= 0)).nonzero().squeeze(1)
    return WeightedRows(
        positions=kept,
        targets=targets[kept],
        row_max=row_max[kept],
        scale=upstream * token_weight[kept] / sum_exp[kept],
        at_target=torch.expm1(-loss[kept]) * sum_exp[kept],
    )


def logit_gradient_(
    z: Tensor,  # (R, v), overwritten
    start: int,
    rows: WeightedRows,  # R rows
) -> Tensor:  # (R, v)
    inside, column = _targets_inside(rows.targets, start, z.shape[1])
    z.sub_(rows.row_max[:, None]).exp_()
    z[inside, column] = rows.at_target[inside]
    return z.mul_(rows.scale[:, None])


class _WeightedSum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        logit_scale: float,
        softcap: float | None,
        targets: Tensor,  # (N,)
        token_weight: Tensor,  # (N,)
        stats: TokenStats,
    ) -> Tensor:  # ()
        per_token = (targets, token_weight, stats.loss, stats.row_max, stats.sum_exp)
        ctx.save_for_backward(hidden, weight, bias, *per_token)
        ctx.logit_scale, ctx.softcap = logit_scale, softcap
        return (token_weight * stats.loss).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator's signature
        ctx: Any,
        upstream: Tensor,  # ()
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *per_token = ctx.saved_tensors
        head = Head(weight, bias, ctx.logit_scale, ctx.softcap)
        rows = rows_with_weight(upstream * ctx.logit_scale, *per_token)
        gradients = _head_gradients(hidden, head, rows, ctx.needs_input_grad[:3])
        return (*gradients, None, None, None, None, None)


def _head_gradients(
    hidden: Tensor,  # (N, D)
    head: Head,
    rows: WeightedRows,  # K of the N
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # (N, D), (V, D), (V,)
    dtype = compute_dtype(hidden)
    selected = hidden.index_select(0, rows.positions).to(dtype)  # (K, D)
    grad_selected = torch.zeros_like(selected) if wanted[0] else None
    grad_weight = torch.zeros_like(head.weight) if wanted[1] else None
    grad_bias = torch.zeros_like(head.bias) if head.bias is not None and wanted[2] else None
    buffer = _tile_buffer(head, len(selected), dtype)
    for part in _vocabulary_slices(head, dtype):
        # The sums are the outputs themselves in the compute dtype; otherwise rounded once, below.
        weight_out = None if grad_weight is None else part.of(grad_weight)
        bias_out = None if grad_bias is None else part.of(grad_bias)
        weight_sum = None if weight_out is None else weight_out.to(dtype)
        bias_sum = None if bias_out is None else bias_out.to(dtype)
        for mine in row_blocks(len(selected), _tile_shape(hidden.device)[0]):
            gradient = _tile_gradient(selected[mine], part, head, rows.part(mine), buffer)
            if grad_selected is not None:
                grad_selected[mine].addmm_(gradient, part.weight)
            if weight_sum is not None:
                weight_sum.addmm_(gradient.T, selected[mine])
            if bias_sum is not None:
                bias_sum += gradient.sum(dim=0)
        if weight_out is not None and weight_sum is not None:
            weight_out.copy_(weight_sum)
        if bias_out is not None and bias_sum is not None:
            bias_out.copy_(bias_sum)
    return _scatter(hidden, rows, grad_selected), grad_weight, grad_bias


def _scatter(
    hidden: Tensor,  # (N, D)
    rows: WeightedRows,  # K of the N
    grad_selected: Tensor | None,  # (K, D)
) -> Tensor | None:  # (N, D)
    if grad_selected is None:
        return None
    return torch.zeros_like(hidden).index_copy_(0, rows.positions, grad_selected.to(hidden.dtype))


def _tile_gradient(
    block: Tensor,  # (R, D)
    part: _Slice,
    head: Head,
    rows: WeightedRows,  # R rows
    buffer: Tensor,
) -> Tensor:  # (R, v), gradient of hidden @ weight.T + bias
    z = _tile_logits(block, part, head, buffer)
    slope = None if head.softcap is None else 1 - (z / head.softcap).square_()
    gradient = logit_gradient_(z, part.start, rows)
    return gradient if slope is None else gradient.mul_(slope)


def weighted_sum(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    stats: TokenStats,
) -> Tensor:  # ()
    """Differentiable sum of token_weight * token_loss, from a forward pass already made."""
    return _WeightedSum.apply(hidden, *head, targets, token_weight, stats)
