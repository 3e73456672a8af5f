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
from slm_kernels.products import linear
from slm_kernels.rows import WeightedRows, weighted_rows

BLOCK_BYTES = 2**25  # of whole rows of logits, where the weights are known: 32 MiB
LEAST_ROWS = 128  # of them: fewer make slow products
CACHED_ROWS = 512  # of a tile of 1,024 columns: 2 MiB, which a core's second cache about holds
EXP_IS_ZERO = -1000.0  # exp of it is exactly 0 in float32 and float64, and 0 * it is not NaN


def cache_block(hidden: Tensor) -> int:
    return _tile_shape(hidden.device)[1]


def _tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries of a tile: 16 MiB of float32 on a CPU, 256 MiB elsewhere."""
    return (4096, 1024) if device.type == "cpu" else (8192, 8192)


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


def _vocabulary_slices(
    head: Head, dtype: torch.dtype, num_rows: int | None = None
) -> Iterator[_Slice]:
    """Of a tile's columns; of more where its rows are fewer and known."""
    rows, columns = _tile_shape(head.weight.device)
    if num_rows is not None:
        columns *= max(1, rows // max(1, num_rows))
    for start in range(0, head.weight.shape[0], columns):
        stop = start + columns
        bias = None if head.bias is None else head.bias[start:stop].to(dtype)
        yield _Slice(start, head.weight[start:stop].to(dtype), bias)


def _tile_logits(
    block: Tensor,  # (R, D)
    part: _Slice,
    head: Head,
) -> Tensor:  # (R, v)
    z = linear(block, part.weight, part.bias)
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z


def _room(
    buffer: Tensor,  # at least R * v elements
    block: Tensor,  # (R, D)
    part: _Slice,
) -> Tensor:  # (R, v)
    shape = (block.shape[0], part.weight.shape[0])
    return buffer[: shape[0] * shape[1]].view(shape)


def _targets_inside(
    targets: Tensor,  # (R,)
    start: int,
    size: int,
) -> tuple[Tensor, Tensor]:  # (r,), (r,)
    """The rows whose target lies in the slice, and its column there."""
    rows = ((targets >= start) & (targets < start + size)).nonzero().squeeze(1)
    return rows, targets[rows] - start


def _tile_sums(
    z: Tensor,  # (R, v), overwritten
    room: Tensor,  # (R, v), written: softmax(z)
    tile_max: Tensor,  # (R,)
    want_entropy: bool,
) -> tuple[Tensor, Tensor | None]:  # (R,), (R,): sum of e and of (z - max) * e, e = exp(z - max)
    """By a few rows at a time on a CPU, which stay in its cache from one operation to the next."""
    size = CACHED_ROWS if z.device.type == "cpu" else len(z)
    sums, sums_z = [], []
    columns = (one.split(size) for one in (z, room, tile_max))
    for part, probability, top in zip(*columns, strict=True):
        # softmax makes maximum, exponentials and sum in one pass; its maximum is 1 / sum.
        torch.softmax(part, dim=1, out=probability)
        tile_sum = probability.amax(dim=1).reciprocal()
        impossible = (top == -torch.inf).nonzero().squeeze(1)
        probability[impossible], tile_sum[impossible] = 0, 0  # else NaN
        sums.append(tile_sum)
        if want_entropy:
            shifted = part.sub_(top[:, None]).clamp_(min=EXP_IS_ZERO)
            sums_z.append(shifted.mul_(probability).sum(dim=1) * tile_sum)
    return torch.cat(sums), torch.cat(sums_z) if want_entropy else None


def stats_of_tiles(
    tiles: Iterable[tuple[int, Tensor, Tensor]],  # start, logits (R, v), room (R, v); overwritten
    targets: Tensor,  # (R,), all valid
    dtype: torch.dtype,
    want_entropy: bool = False,
    want_correct: bool = False,
    keep: Callable[[int, Tensor, Tensor, Tensor], None] = lambda *tile: None,
) -> TokenStats:
    """Of tiles in the order of the vocabulary.

    `keep` is given softmax(z), maximum and sum of exp(z - maximum) of every tile.
    """
    row_max = torch.full_like(targets, torch.finfo(dtype).min, dtype=dtype)
    target_logit, sum_exp, sum_exp_z = (torch.zeros_like(row_max) for _ in range(3))
    correct = torch.ones_like(targets, dtype=torch.bool) if want_correct else None
    for start, z, room in tiles:
        tile_max = z.amax(dim=1)
        rows, column = _targets_inside(targets, start, z.shape[1])
        target_logit[rows] = z[rows, column]
        if correct is not None:
            # The target is the first maximum if it is the first of its own tile, beats every tile
            # before, and is beaten by none after.
            correct &= tile_max <= row_max
            correct[rows] = (z[rows].argmax(dim=1) == column) & (tile_max > row_max)[rows]

        tile_sum, tile_sum_z = _tile_sums(z, room, tile_max, want_entropy)
        new_max = torch.maximum(row_max, tile_max)
        drop, tile_drop = ((one - new_max).clamp_(min=EXP_IS_ZERO) for one in (row_max, tile_max))
        if tile_sum_z is not None:
            sum_exp_z = (sum_exp_z + drop * sum_exp) * drop.exp()
            sum_exp_z += (tile_sum_z + tile_drop * tile_sum) * tile_drop.exp()
        sum_exp = sum_exp * drop.exp() + tile_sum * tile_drop.exp()
        row_max = new_max
        keep(start, room, tile_max, tile_sum)
        del z  # before the next tile is made
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
    valid = (targets >= 0).nonzero().squeeze(1)
    rows_at_once, columns = _tile_shape(hidden.device)
    size = min(rows_at_once, len(valid)) * min(columns, len(head.weight))
    buffer = hidden.new_empty(size, dtype=dtype)
    for mine in row_blocks(len(valid), rows_at_once):
        rows = valid[mine]
        block = hidden.index_select(0, rows).to(dtype)
        tiles = (
            (part.start, _tile_logits(block, part, head), _room(buffer, block, part))
            for part in _vocabulary_slices(head, dtype)
        )
        keep = partial(_write_cache, cache, mine if len(valid) == len(targets) else rows)
        found = stats_of_tiles(tiles, targets[rows], dtype, want_entropy, want_correct, keep)
        write_rows(stats, rows, found)
    return stats


def _write_cache(
    cache: LogitsCache,
    rows: Tensor | slice,  # R of the N
    start: int,
    probability: Tensor,  # (R, v), overwritten
    tile_max: Tensor,  # (R,)
    tile_sum: Tensor,  # (R,)
) -> None:
    columns = slice(start, min(start + probability.shape[1], cache.exps.shape[1]))
    if start < columns.stop:
        exps = probability[:, : columns.stop - start].mul_(tile_sum[:, None])
        cache.exps[rows, columns] = exps.to(cache.exps.dtype)
        cache.offset[rows, start // cache.block] = tile_max


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
    grad_weight = head.weight.new_empty(head.weight.shape) if wanted[1] else None
    grad_bias = (
        head.bias.new_empty(head.bias.shape) if head.bias is not None and wanted[2] else None
    )
    for part in _vocabulary_slices(head, dtype):
        # The sums are the outputs themselves in the compute dtype; otherwise rounded once, below.
        weight_out = None if grad_weight is None else part.of(grad_weight).zero_()
        bias_out = None if grad_bias is None else part.of(grad_bias).zero_()
        weight_sum = None if weight_out is None else weight_out.to(dtype)
        bias_sum = None if bias_out is None else bias_out.to(dtype)
        for mine in row_blocks(len(selected), _tile_shape(hidden.device)[0]):
            some = rows.part(mine)
            gradient = _tile_gradient(selected[mine], part, head, some, cache)
            sums = HeadGradients(
                None if grad_selected is None else grad_selected[mine], weight_sum, bias_sum
            )
            _add_gradients(sums, gradient, part, scaled[mine], some.scale)
            del gradient  # before the next tile is made
        if weight_out is not None and weight_sum is not None:
            weight_out.copy_(weight_sum)
        if bias_out is not None and bias_sum is not None:
            bias_out.copy_(bias_sum)
    if grad_selected is not None:
        grad_selected = rows.scatter(grad_selected.mul_(rows.scale[:, None]), like=hidden)
    return HeadGradients(grad_selected, grad_weight, grad_bias)


def _add_gradients(
    sums: HeadGradients,  # (R, D), (v, D), (v,): added to
    gradient: Tensor,  # (R, v), over the rows' scale
    part: _Slice,
    scaled: Tensor,  # (R, D), hidden * scale
    scale: Tensor,  # (R,)
) -> None:
    """The rows' sum lacks their scale."""
    if sums.hidden is not None:
        sums.hidden.add_(linear(gradient, part.weight.T))
    if sums.weight is not None:
        sums.weight.addmm_(gradient.T, scaled)
    if sums.bias is not None:
        sums.bias.addmv_(gradient.T, scale)


def _tile_gradient(
    block: Tensor,  # (R, D)
    part: _Slice,
    head: Head,
    rows: WeightedRows,  # R rows
    cache: LogitsCache,
) -> Tensor:  # (R, v), gradient of hidden @ weight.T + bias, over the rows' scale
    if part.start + len(part.weight) <= cache.exps.shape[1]:
        return _cached_gradient(part, head, rows, cache, block.dtype)
    z = _tile_logits(block, part, head)
    return logit_gradient_(z, part.start, rows, head.softcap)


def _cached_gradient(
    part: _Slice, head: Head, rows: WeightedRows, cache: LogitsCache, dtype: torch.dtype
) -> Tensor:  # (R, v)
    columns = cache.exps[:, part.start : part.start + len(part.weight)]
    offset = cache.offset[rows.positions, part.start // cache.block]
    exps = columns.index_select(0, rows.positions).to(dtype)
    return _gradient_of_exps_(exps, offset, part.start, rows, head.softcap)


def _gradient_of_exps_(
    exps: Tensor,  # (R, v), exp(z - offset), overwritten
    offset: Tensor,  # (R,)
    start: int,
    rows: WeightedRows,  # R rows
    softcap: float | None,
) -> Tensor:  # (R, v), gradient before the soft cap, over the rows' scale
    slope = None
    if softcap is not None:  # what underflowed to 0 has no logit any more, and needs none
        z = exps.clamp(min=torch.finfo(exps.dtype).tiny).log_().add_(offset[:, None])
        slope = 1 - z.div_(softcap).square_()
    gradient = exps.mul_((offset - rows.row_max).exp_()[:, None])
    return _with_targets_(gradient if slope is None else gradient.mul_(slope), start, rows)


def sum_and_gradients(
    hidden: Tensor,  # (N, D), float32 or float64
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    wanted: tuple[bool, bool, bool],
) -> tuple[TokenStats, HeadGradients]:
    """Stats of all rows, and the gradients of the sum of token_weight * token_loss.

    The exponentials of whole rows exist for a block of rows at a time.
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
        some = rows[mine]
        block = hidden.index_select(0, some)
        sums = gradients._replace(hidden=torch.zeros_like(block) if wanted[0] else None)
        found, scale = _add_block(block, head, targets[some], token_weight[some], sums, buffer)
        write_rows(stats, some, found)
        if gradients.hidden is not None and sums.hidden is not None:
            gradients.hidden.index_copy_(0, some, sums.hidden.mul_(scale[:, None]))
    return stats, gradients


def _add_block(
    block: Tensor,  # (R, D)
    head: Head,
    targets: Tensor,  # (R,)
    token_weight: Tensor,  # (R,), nowhere zero
    sums: HeadGradients,  # (R, D), (V, D), (V,): added to; the rows' sum lacks their scale
    buffer: Tensor,  # at least R * V elements
) -> tuple[TokenStats, Tensor]:  # and the rows' scale (R,)
    parts = list(_vocabulary_slices(head, block.dtype, len(block)))
    exps = [_room(buffer[len(block) * part.start :], block, part) for part in parts]
    offsets: list[Tensor] = []

    def keep(start: int, probability: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        probability.mul_(tile_sum[:, None])
        offsets.append(tile_max)

    tiles = (
        (part.start, _tile_logits(block, part, head), room)
        for part, room in zip(parts, exps, strict=True)
    )
    stats = stats_of_tiles(tiles, targets, block.dtype, keep=keep)
    upstream = block.new_full((), head.logit_scale)
    per_token = (targets, token_weight, stats.loss, stats.row_max, stats.sum_exp)
    rows = weighted_rows(upstream, *per_token, head.softcap, capacity=None)
    scaled = block * rows.scale[:, None]
    for part, tile, offset in zip(parts, exps, offsets, strict=True):
        gradient = _gradient_of_exps_(tile, offset, part.start, rows, head.softcap)
        mine = HeadGradients(
            sums.hidden,
            None if sums.weight is None else part.of(sums.weight),
            None if sums.bias is None else part.of(sums.bias),
        )
        _add_gradients(mine, gradient, part, scaled, rows.scale)
    return stats, rows.scale
