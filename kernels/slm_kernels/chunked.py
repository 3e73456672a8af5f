"""Torch on any device, in memory bounded by one tile of logits: the N x V logits never exist.

The forward pass walks over tiles (rows x a slice of the vocabulary) and keeps three numbers a
token. The backward pass gathers the rows with a weight, computes their logits again, tile by tile,
and writes each slice of the weight's gradient once:

    G = (softmax(z) - onehot) * scale    grad_weight[slice] = G.T @ hidden    grad_hidden += G @ W

Matrix work: 2 NVD forward and 6 KVD backward for K rows with a weight; autograd needs 6 NVD.
Columns in the logits cache are read from it instead: 4 KVD. Where the weights are known before the
forward pass, `sum_and_gradients` makes the gradients in it, from the same logits: 2 NVD + 4 KVD.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from slm_kernels.contracts import Head, HeadGradients, LogitsCache, TokenStats, compute_dtype
from slm_kernels.rows import WeightedRows

BLOCK_BYTES = 2**25  # of whole rows of logits, where the weights are known: 32 MiB
LEAST_ROWS = 128  # of them: fewer make slow products
EXP_IS_ZERO = -1000.0  # exp of it is exactly 0 in float32 and float64, and 0 * it is not NaN


def cache_block(hidden: Tensor) -> int:
    return _tile_shape(hidden.device)[1]


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
    shape = (block.shape[0], part.weight.shape[0])
    return _fill_logits(buffer[: shape[0] * shape[1]].view(shape), block, part, head)


def _fill_logits(
    z: Tensor,  # (R, v), overwritten
    block: Tensor,  # (R, D)
    part: _Slice,
    head: Head,
) -> Tensor:  # (R, v)
    # Only out= and in-place products in this file: autocast leaves those in float32.
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
    want_entropy: bool = False,
    want_correct: bool = False,
    keep: Callable[[int, Tensor, Tensor], None] = lambda start, exps, offset: None,
) -> TokenStats:
    """`keep` is shown exp(z - offset) of every tile."""
    row_max = torch.full_like(targets, torch.finfo(dtype).min, dtype=dtype)
    target_logit, sum_exp, sum_exp_z = (torch.zeros_like(row_max) for _ in range(3))
    correct = torch.ones_like(targets, dtype=torch.bool) if want_correct else None
    for start, z in tiles:
        tile_max = z.amax(dim=1)
        rows, column = _targets_inside(targets, start, z.shape[1])
        target_logit[rows] = z[rows, column]
        if correct is not None:
            # The target is the first maximum if it is the first of its own tile, beats every tile
            # before, and is beaten by none after.
            correct &= tile_max <= row_max
            correct[rows] = (z[rows].argmax(dim=1) == column) & (tile_max > row_max)[rows]

        new_max = torch.maximum(row_max, tile_max)
        drop = (row_max - new_max).clamp_(min=EXP_IS_ZERO)
        z.sub_(new_max[:, None])
        shifted = z.clamp(min=EXP_IS_ZERO) if want_entropy else None
        z.exp_()
        keep(start, z, new_max)
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
    want_entropy: bool = False,
    want_correct: bool = False,
) -> TokenStats:
    """What an ignored row has."""
    zero = torch.zeros_like(targets, dtype=dtype)
    entropy = torch.zeros_like(zero) if want_entropy else None
    correct = torch.zeros_like(targets, dtype=torch.bool) if want_correct else None
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
    want_correct: bool,
    cache: LogitsCache,  # written
) -> TokenStats:
    dtype = compute_dtype(hidden)
    stats = empty_stats(targets, dtype, want_entropy, want_correct)
    buffer = _tile_buffer(head, len(targets), dtype)
    valid = (targets >= 0).nonzero().squeeze(1)
    for mine in row_blocks(len(valid), _tile_shape(hidden.device)[0]):
        rows = valid[mine]
        block = hidden.index_select(0, rows).to(dtype)
        tiles = (
            (part.start, _tile_logits(block, part, head, buffer))
            for part in _vocabulary_slices(head, dtype)
        )
        keep = partial(_write_cache, cache, rows)
        found = stats_of_tiles(tiles, targets[rows], dtype, want_entropy, want_correct, keep)
        write_rows(stats, rows, found)
    return stats


def _write_cache(
    cache: LogitsCache,
    rows: Tensor,  # (R,)
    start: int,
    exps: Tensor,  # (R, v)
    offset: Tensor,  # (R,)
) -> None:
    out = cache.exps[:, start : start + exps.shape[1]]
    if out.shape[1]:
        out.index_copy_(0, rows, exps[:, : out.shape[1]].to(out.dtype))
        cache.offset[:, start // cache.block].index_copy_(0, rows, offset)


def logit_gradient_(
    z: Tensor,  # (R, v), overwritten
    start: int,
    rows: WeightedRows,  # R rows
    softcap: float | None = None,
) -> Tensor:  # (R, v), gradient before the soft cap, over the rows' scale
    slope = None if softcap is None else 1 - (z / softcap).square_()
    gradient = z.sub_(rows.row_max[:, None]).exp_()
    return _with_targets_(gradient if slope is None else gradient.mul_(slope), start, rows)


def _with_targets_(gradient: Tensor, start: int, rows: WeightedRows) -> Tensor:
    inside, column = _targets_inside(rows.targets, start, gradient.shape[1])
    gradient[inside, column] = rows.at_target[inside]
    return gradient


def head_gradients(
    hidden: Tensor,  # (N, D)
    head: Head,
    rows: WeightedRows,  # K of the N
    cache: LogitsCache,
    wanted: tuple[bool, bool, bool],
) -> HeadGradients:
    """The rows' scale goes to the (K, D) factors, which are smaller than the (K, V) gradient."""
    dtype = compute_dtype(hidden)
    selected = rows.gather(hidden).to(dtype)  # (K, D)
    scaled = selected * rows.scale[:, None]
    grad_selected = torch.zeros_like(selected) if wanted[0] else None
    grad_weight = head.weight.new_zeros(head.weight.shape) if wanted[1] else None
    grad_bias = (
        head.bias.new_zeros(head.bias.shape) if head.bias is not None and wanted[2] else None
    )
    buffer = _tile_buffer(head, len(selected), dtype)
    for part in _vocabulary_slices(head, dtype):
        # The sums are the outputs themselves in the compute dtype; otherwise rounded once, below.
        weight_out = None if grad_weight is None else part.of(grad_weight)
        bias_out = None if grad_bias is None else part.of(grad_bias)
        weight_sum = None if weight_out is None else weight_out.to(dtype)
        bias_sum = None if bias_out is None else bias_out.to(dtype)
        for mine in row_blocks(len(selected), _tile_shape(hidden.device)[0]):
            some = rows.part(mine)
            gradient = _tile_gradient(selected[mine], part, head, some, cache, buffer)
            if grad_selected is not None:
                grad_selected[mine].addmm_(gradient, part.weight)
            if weight_sum is not None:
                weight_sum.addmm_(gradient.T, scaled[mine])
            if bias_sum is not None:
                bias_sum.addmv_(gradient.T, some.scale)
        if weight_out is not None and weight_sum is not None:
            weight_out.copy_(weight_sum)
        if bias_out is not None and bias_sum is not None:
            bias_out.copy_(bias_sum)
    if grad_selected is not None:
        grad_selected = rows.scatter(grad_selected.mul_(rows.scale[:, None]), like=hidden)
    return HeadGradients(grad_selected, grad_weight, grad_bias)


def _tile_gradient(
    block: Tensor,  # (R, D)
    part: _Slice,
    head: Head,
    rows: WeightedRows,  # R rows
    cache: LogitsCache,
    buffer: Tensor,
) -> Tensor:  # (R, v), gradient of hidden @ weight.T + bias, over the rows' scale
    if part.start + len(part.weight) <= cache.exps.shape[1]:
        return _cached_gradient(part, head, rows, cache, buffer)
    z = _tile_logits(block, part, head, buffer)
    return logit_gradient_(z, part.start, rows, head.softcap)


def sum_and_gradients(
    hidden: Tensor,  # (N, D), float32 or float64
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    wanted: tuple[bool, bool, bool],
) -> tuple[TokenStats, HeadGradients]:
    """Stats of all rows, and the gradients of the sum of token_weight * token_loss.

    Whole rows of logits exist for a block of rows at a time.
    """
    weighted = (token_weight != 0) & (targets >= 0)
    no_cache = LogitsCache(hidden.new_empty(0, 0), hidden.new_empty(0, 0), 1)
    others = targets.masked_fill(weighted, -1)
    stats = token_stats(hidden, head, others, False, False, no_cache)
    gradients = HeadGradients(
        hidden=torch.zeros_like(hidden) if wanted[0] else None,
        weight=head.weight.new_zeros(head.weight.shape) if wanted[1] else None,
        bias=head.weight.new_zeros(len(head.weight)) if wanted[2] else None,
    )
    rows = weighted.nonzero().squeeze(1)
    size = max(LEAST_ROWS, BLOCK_BYTES // (len(head.weight) * hidden.element_size()))
    buffer = hidden.new_empty(min(size, len(rows)) * len(head.weight))
    for mine in row_blocks(len(rows), size):
        z = buffer[: (mine.stop - mine.start) * len(head.weight)].view(-1, len(head.weight))
        _gradients_of_block(hidden, head, targets, token_weight, rows[mine], stats, gradients, z)
    return stats, gradients


def _gradients_of_block(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,)
    token_weight: Tensor,  # (N,)
    rows: Tensor,  # (R,)
    stats: TokenStats,  # written
    gradients: HeadGradients,  # added to
    z: Tensor,  # (R, V), overwritten
) -> None:
    block = hidden.index_select(0, rows)
    parts = list(_vocabulary_slices(head, hidden.dtype))
    tiles = [part.of(z.T).T for part in parts]  # (R, v) each
    row_max = z.new_full((len(rows),), torch.finfo(z.dtype).min)
    for part, tile in zip(parts, tiles, strict=True):
        _fill_logits(tile, block, part, head)
        row_max = torch.maximum(row_max, tile.amax(dim=1))
    at = torch.arange(len(rows), device=z.device), targets[rows]
    target_logit = z[at]
    slopes = [
        None if head.softcap is None else 1 - (tile / head.softcap).square_() for tile in tiles
    ]
    sum_exp = torch.zeros_like(row_max)
    for tile in tiles:
        sum_exp += tile.sub_(row_max[:, None]).exp_().sum(dim=1)
    loss = (row_max - target_logit) + sum_exp.log()
    write_rows(stats, rows, TokenStats(loss, row_max, sum_exp, None, None))
    z[at] = torch.expm1(-loss) * sum_exp
    scale = head.logit_scale * token_weight[rows] / sum_exp
    scaled = block * scale[:, None]
    total = torch.zeros_like(block)
    for part, tile, slope in zip(parts, tiles, slopes, strict=True):
        gradient = tile if slope is None else tile.mul_(slope)
        if gradients.hidden is not None:
            total.addmm_(gradient, part.weight)
        if gradients.weight is not None:
            part.of(gradients.weight).addmm_(gradient.T, scaled)
        if gradients.bias is not None:
            part.of(gradients.bias).addmv_(gradient.T, scale)
    if gradients.hidden is not None:
        gradients.hidden.index_copy_(0, rows, total.mul_(scale[:, None]))


def _cached_gradient(
    part: _Slice, head: Head, rows: WeightedRows, cache: LogitsCache, buffer: Tensor
) -> Tensor:  # (R, v)
    stop = part.start + len(part.weight)
    offset = cache.offset[rows.positions, part.start // cache.block]
    exps = cache.exps[:, part.start : stop].index_select(0, rows.positions)
    gradient = buffer[: exps.numel()].view(exps.shape).copy_(exps)
    slope = None
    if head.softcap is not None:  # what underflowed to 0 has no logit any more, and needs none
        z = gradient.clamp(min=torch.finfo(gradient.dtype).tiny).log_() + offset[:, None]
        slope = 1 - z.div_(head.softcap).square_()
    gradient.mul_((offset - rows.row_max).exp_()[:, None])
    return _with_targets_(gradient if slope is None else gradient.mul_(slope), part.start, rows)
