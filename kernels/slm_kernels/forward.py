"""Triton forward: loss, row maximum and sum of exponentials of every row; no logits in memory.

A program owns a block of rows and a share of the vocabulary. It walks over its tiles with float32
accumulators and a running maximum (online log-sum-exp); the shares are joined in a few torch
operations on (shares, N) numbers. The target's logit is read from the same accumulators, so that
row_max - target_logit is exactly 0 where the target is the maximum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_kernels.contracts import Head, LogitsCache, TokenStats
from slm_kernels.tiles import (
    LOG2_E,
    Tile,
    interpreted,
    is_plain,
    logits_tile,
    pick_tile,
    place_of,
    readable,
)

LOWEST = tl.constexpr(-1e38)  # finite, so that differences from it are no NaN
EXP2_IS_ZERO = tl.constexpr(-2000.0)  # exp2 of it is exactly 0, and 0 * it is not NaN
PROGRAMS = 2048  # wanted at least: about 16 waves on the largest chips, so that the last is short


class _Partials(NamedTuple):
    """Each program's numbers: one line a share of the vocabulary."""

    row_max: Tensor  # (S, N)
    sum_exp: Tensor  # (S, N)
    sum_exp_z: Tensor | None  # (S, N), sum of (z - row_max) exp(z - row_max)
    argmax: Tensor | None  # (S, N), int32, lowest index of the share's maximum


# One binary for any number of tokens: what is aligned lies along the other axes.
@triton.jit(do_not_specialize=["N", "tiles_per_share", "num_shares"])
def _stats_kernel(
    hidden,
    weight,
    bias,
    targets,
    row_max_out,
    sum_exp_out,
    target_logit_out,
    sum_exp_z_out,
    argmax_out,
    cache,
    cache_offset,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    cache_stride,
    offset_stride,
    logit_scale,
    softcap,
    tiles_per_share,
    num_shares,
    cached_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    WHOLE_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_block, share = place_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_shares, GROUP_N)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    target = tl.load(targets + rows, mask=row_mask, other=-1).to(tl.int32)
    if tl.max(target, 0) < 0:
        return  # nothing but ignored rows
    row_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    sum_exp_z = tl.zeros((BLOCK_N,), tl.float32)
    argmax = tl.zeros((BLOCK_N,), tl.int32)
    first_tile = share * tiles_per_share
    last_tile = tl.minimum(first_tile + tiles_per_share, tl.cdiv(V, BLOCK_V))
    for tile in range(first_tile, last_tile):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = logits_tile(
            hidden, weight, bias, row_block * BLOCK_N, tile * BLOCK_V, N, V, D,
            hidden_stride, weight_stride, logit_scale, softcap,
            BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_D, HAS_BIAS, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip
        target = tl.load(targets + rows, mask=row_mask, other=-1).to(tl.int32)
        inside = (target >= tile * BLOCK_V) & (target < (tile + 1) * BLOCK_V)
        if tl.max(inside.to(tl.int32), 0) > 0:
            found = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
            tl.store(target_logit_out + rows, found, mask=inside)
        z = tl.where(columns[None, :] < V, z, float("-inf"))
        tile_max = tl.max(z, 1)
        if WANT_ARGMAX:
            at_max = tl.where(z == tile_max[:, None], columns[None, :], 2147483647)
            argmax = tl.where(tile_max > row_max, tl.min(at_max, 1), argmax)
        new_max = tl.maximum(row_max, tile_max)
        drop = (row_max - new_max) * LOG2_E
        shifted = (z - new_max[:, None]) * LOG2_E
        exps = tl.exp2(shifted)
        if WANT_ENTROPY:
            drop = tl.maximum(drop, EXP2_IS_ZERO)
            moved = (sum_exp_z + drop * sum_exp) * tl.exp2(drop)
            sum_exp_z = moved + tl.sum(tl.maximum(shifted, EXP2_IS_ZERO) * exps, 1)
        sum_exp = sum_exp * tl.exp2(drop) + tl.sum(exps, 1)
        row_max = new_max
        if HAS_CACHE:
            if tile * BLOCK_V < cached_columns:
                # Relative to the maximum so far: at most 1, and underflow is far below the sum.
                first_row = cache + (row_block * BLOCK_N).to(tl.int64) * cache_stride
                local = tl.arange(0, BLOCK_N)
                place = first_row + (local[:, None] * cache_stride + columns[None, :])
                kept = row_mask[:, None] & (columns[None, :] < cached_columns)
                tl.store(place, exps.to(cache.dtype.element_ty), mask=kept)
                place = cache_offset + rows.to(tl.int64) * offset_stride + tile
                tl.store(place, new_max, mask=row_mask)
    out = share.to(tl.int64) * N + rows
    tl.store(row_max_out + out, row_max, mask=row_mask)
    tl.store(sum_exp_out + out, sum_exp, mask=row_mask)
    if WANT_ENTROPY:
        tl.store(sum_exp_z_out + out, sum_exp_z / LOG2_E, mask=row_mask)
    if WANT_ARGMAX:
        tl.store(argmax_out + out, argmax, mask=row_mask)


def _shares(num_rows: int, vocab_size: int, tile: Tile) -> tuple[int, int]:
    """Tiles in each program's share of the vocabulary, and the number of shares."""
    tiles = triton.cdiv(vocab_size, tile.vocab)
    wanted = max(1, PROGRAMS // max(1, triton.cdiv(num_rows, tile.rows)))
    tiles_per_share = triton.cdiv(tiles, min(tiles, wanted))
    return tiles_per_share, triton.cdiv(tiles, tiles_per_share)


def token_stats(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    want_entropy: bool,
    want_correct: bool,
    cache: LogitsCache,
) -> TokenStats:
    hidden, head = readable(hidden, head)
    cached = cache.exps.numel() > 0
    extras = (want_entropy, want_correct, cached)
    tile = pick_tile(hidden, plain=is_plain(hidden, head) and not any(extras))
    num_rows, width = hidden.shape
    vocab_size = head.weight.shape[0]
    tiles_per_share, num_shares = _shares(num_rows, vocab_size, tile)
    empty = lambda dtype: hidden.new_empty((num_shares, num_rows), dtype=dtype)  # noqa: E731
    partials = _Partials(
        row_max=empty(torch.float32),
        sum_exp=empty(torch.float32),
        sum_exp_z=empty(torch.float32) if want_entropy else None,
        argmax=empty(torch.int32) if want_correct else None,
    )
    target_logit = hidden.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        _stats_kernel[(triton.cdiv(num_rows, tile.rows) * num_shares,)](
            hidden, head.weight, head.bias, targets,
            partials.row_max, partials.sum_exp, target_logit, partials.sum_exp_z, partials.argmax,
            cache.exps, cache.offset,
            num_rows, vocab_size, width,
            hidden.stride(0), head.weight.stride(0), cache.exps.stride(0), cache.offset.stride(0),
            head.logit_scale, head.softcap or 1.0, tiles_per_share, num_shares,
            cache.exps.shape[1],
            BLOCK_N=tile.rows, BLOCK_V=tile.vocab, BLOCK_D=tile.width, GROUP_N=tile.group,
            WHOLE_D=width % tile.width == 0,
            HAS_BIAS=head.bias is not None, HAS_SOFTCAP=head.softcap is not None,
            WANT_ENTROPY=want_entropy, WANT_ARGMAX=want_correct,
            HAS_CACHE=cached, UPCAST=interpreted(),
            **tile.options(),
        )  # fmt: skip
    return _join(partials, target_logit, targets)


def _join(
    partials: _Partials,
    target_logit: Tensor,  # (N,)
    targets: Tensor,  # (N,)
) -> TokenStats:
    valid = targets >= 0
    row_max = partials.row_max.amax(0)
    drop = (partials.row_max - row_max).clamp_(min=-1000.0)  # exp of it is 0; -inf * 0 is NaN
    factor = drop.exp()
    sum_exp = (partials.sum_exp * factor).sum(0)
    log_sum = sum_exp.log()
    entropy = correct = None
    if partials.sum_exp_z is not None:
        sum_exp_z = (factor * (partials.sum_exp_z + drop * partials.sum_exp)).sum(0)
        entropy = (log_sum - sum_exp_z / sum_exp).clamp_(min=0).where(valid, 0.0)
    if partials.argmax is not None:
        share = (partials.row_max == row_max).int().argmax(0, keepdim=True)  # the first of them
        correct = (partials.argmax.gather(0, share)[0] == targets) & valid
    return TokenStats(
        loss=((row_max - target_logit) + log_sum).where(valid, 0.0),
        row_max=row_max.where(valid, 0.0),
        sum_exp=sum_exp.where(valid, 1.0),
        entropy=entropy,
        correct=correct,
    )
