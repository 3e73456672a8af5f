"""Triton backward: the gradient of the logits, of the K rows with a weight, a slice at a time.

    G = (softmax(z) - onehot) * scale    grad_weight[slice] = G.T @ hidden    grad_hidden += G @ W

Each slice of the weight's gradient is written once, by one product over all K rows, so there is
nothing to accumulate; the gradient of the rows accumulates over slices in float32. Columns in the
logits cache are read from it instead of being computed again.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_kernels.contracts import Head, HeadGradients, LogitsCache
from slm_kernels.rows import WeightedRows
from slm_kernels.tiles import (
    LOG2_E,
    interpreted,
    is_plain,
    logits_tile,
    pick_tile,
    place_of,
    readable,
)

SLICE_BYTES = 2**26  # of G: 64 MiB
SLICE_COLUMNS = (1024, 8192)  # at least and at most
# Older ones refuse to add a product of two-byte operands to float32.
ADDS_TO_FLOAT32 = torch.__version__ >= (2, 11)


# One binary for any number of rows: what is aligned lies along the other axes.
@triton.jit(do_not_specialize=["K"])
def _gradient_kernel(
    selected,
    weight,
    bias,
    targets,
    row_max,
    scale,
    at_target,
    out,
    K,
    V,
    D,
    start,
    stop,
    selected_stride,
    weight_stride,
    out_stride,
    logit_scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    WHOLE_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """G of the columns [start, stop): the logits again, then their gradient."""
    row_blocks, column_blocks = tl.cdiv(K, BLOCK_N), tl.cdiv(stop - start, BLOCK_V)
    row_block, column_block = place_of(tl.program_id(0), row_blocks, column_blocks, GROUP_N)
    first_row, first_column = row_block * BLOCK_N, start + column_block * BLOCK_V
    z = logits_tile(
        selected, weight, bias, first_row, first_column, K, V, D,
        selected_stride, weight_stride, logit_scale, softcap,
        BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_D, HAS_BIAS, HAS_SOFTCAP, UPCAST,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_V)
    mask = rows < K
    target = tl.load(targets + rows, mask=mask, other=-1).to(tl.int32)
    shift = tl.load(row_max + rows, mask=mask, other=float("inf"))
    gradient = tl.exp2((z - shift[:, None]) * LOG2_E)
    if HAS_SOFTCAP:
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    hit = columns[None, :] == target[:, None]
    gradient = tl.where(hit, tl.load(at_target + rows, mask=mask, other=0.0)[:, None], gradient)
    gradient *= tl.load(scale + rows, mask=mask, other=0.0)[:, None]
    local = tl.arange(0, BLOCK_N)[:, None] * out_stride + (columns - start)[None, :]
    place = out + first_row.to(tl.int64) * out_stride + local
    tl.store(place, gradient.to(out.dtype.element_ty), mask=mask[:, None] & (columns < stop)[None])


@triton.jit(do_not_specialize=["K"])
def _cached_gradient_kernel(
    cache,
    cache_offset,
    positions,
    targets,
    row_max,
    scale,
    at_target,
    out,
    K,
    start,
    stop,
    cache_stride,
    offset_stride,
    out_stride,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """G of the columns [start, stop), from the exponentials that the forward pass kept."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = start + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask, column_mask = rows < K, columns < stop
    mask = row_mask[:, None] & column_mask[None, :]
    source = tl.load(positions + rows, mask=row_mask, other=0).to(tl.int64)
    exps = tl.load(cache + source[:, None] * cache_stride + columns[None, :], mask=mask, other=0.0)
    exps = exps.to(tl.float32)
    block = (start + tl.program_id(1) * BLOCK_V) // CACHE_BLOCK
    offset = tl.load(cache_offset + source * offset_stride + block, mask=row_mask, other=0.0)
    shift = tl.load(row_max + rows, mask=row_mask, other=0.0)
    gradient = exps * tl.exp2((offset - shift) * LOG2_E)[:, None]
    if HAS_SOFTCAP:  # what underflowed to 0 has no logit any more, and needs none
        z = tl.log2(tl.maximum(exps, 1e-38)) / LOG2_E + offset[:, None]
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    target = tl.load(targets + rows, mask=row_mask, other=-1).to(tl.int32)
    hit = columns[None, :] == target[:, None]
    there = tl.load(at_target + rows, mask=row_mask, other=0.0)
    gradient = tl.where(hit, there[:, None], gradient)
    gradient *= tl.load(scale + rows, mask=row_mask, other=0.0)[:, None]
    place = out + rows.to(tl.int64)[:, None] * out_stride + (columns - start)[None, :]
    tl.store(place, gradient.to(out.dtype.element_ty), mask=mask)


def _recompute(out: Tensor, selected: Tensor, head: Head, rows: WeightedRows, start: int) -> None:
    tile = pick_tile(selected, plain=is_plain(selected, head))
    (num_rows, columns), width = out.shape, selected.shape[1]
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(columns, tile.vocab),)
    _gradient_kernel[grid](
        selected, head.weight, head.bias, rows.targets, rows.row_max, rows.scale, rows.at_target,
        out, num_rows, head.weight.shape[0], width, start, start + columns,
        selected.stride(0), head.weight.stride(0), out.stride(0),
        head.logit_scale, head.softcap or 1.0,
        BLOCK_N=tile.rows, BLOCK_V=tile.vocab, BLOCK_D=tile.width, GROUP_N=tile.group,
        WHOLE_D=width % tile.width == 0, HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None, UPCAST=interpreted(),
        **tile.options(),
    )  # fmt: skip


def _read_cache(
    out: Tensor, head: Head, rows: WeightedRows, cache: LogitsCache, start: int
) -> None:
    num_rows, columns = out.shape
    block_v = min(128, cache.block)
    grid = (triton.cdiv(num_rows, 16), triton.cdiv(columns, block_v))
    _cached_gradient_kernel[grid](
        cache.exps, cache.offset, rows.positions, rows.targets, rows.row_max, rows.scale,
        rows.at_target, out, num_rows, start, start + columns,
        cache.exps.stride(0), cache.offset.stride(0), out.stride(0), head.softcap or 1.0,
        BLOCK_N=16, BLOCK_V=block_v, CACHE_BLOCK=cache.block,
        HAS_SOFTCAP=head.softcap is not None, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _slices(num_rows: int, vocab_size: int, cached: int, itemsize: int) -> list[tuple[int, int]]:
    """[start, stop) of each slice; none crosses the end of the cached columns."""
    least, most = SLICE_COLUMNS
    width = max(least, min(most, SLICE_BYTES // max(1, num_rows * itemsize) // 256 * 256))
    ends = ((0, cached), (cached, vocab_size))
    return [(i, min(i + width, end)) for begin, end in ends for i in range(begin, end, width)]


def _add_product(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """total += gradient @ weight, in float32."""
    if gradient.dtype == torch.float32 or total.device.type == "cpu":
        total.addmm_(gradient.float(), weight.float())
    elif ADDS_TO_FLOAT32:
        torch.addmm(total, gradient, weight, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(gradient, weight, out_dtype=torch.float32))


def head_gradients(
    hidden: Tensor,  # (N, D)
    head: Head,
    rows: WeightedRows,  # K of the N
    cache: LogitsCache,
    wanted: tuple[bool, bool, bool],
) -> HeadGradients:
    hidden, head = readable(hidden, head)
    weight, bias = head.weight, head.bias
    selected = rows.gather(hidden)  # (K, D)
    total = selected.new_zeros(selected.shape, dtype=torch.float32) if wanted[0] else None
    grad_weight = weight.new_empty(weight.shape) if wanted[1] else None
    grad_bias = bias.new_empty(bias.shape) if bias is not None and wanted[2] else None
    slices = _slices(len(selected), len(weight), cache.exps.shape[1], hidden.element_size())
    buffer = hidden.new_empty(len(selected) * max(stop - start for start, stop in slices))
    for start, stop in slices:
        shape = (len(selected), stop - start)
        gradient = buffer[: math.prod(shape)].view(shape)
        if stop <= cache.exps.shape[1]:
            _read_cache(gradient, head, rows, cache, start)
        else:
            _recompute(gradient, selected, head, rows, start)
        if total is not None:
            _add_product(total, gradient, weight[start:stop])
        if grad_weight is not None:
            torch.mm(gradient.T, selected, out=grad_weight[start:stop])
        if grad_bias is not None:
            grad_bias[start:stop] = gradient.sum(0, dtype=torch.float32)
    grad_hidden = None if total is None else rows.scatter(total, like=hidden)
    return HeadGradients(grad_hidden, grad_weight, grad_bias)
