"""The losses over logits that somebody else made, for trainers that only expose those.

The logits and their gradient exist in full, as they must; beyond them memory is a few rows. As in
ops.py, these are operators of torch, so that a compiled model keeps them whole.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from slm_kernels.chunked import (
    empty_stats,
    logit_gradient_,
    row_blocks,
    stats_of_tiles,
    write_rows,
)
from slm_kernels.contracts import TokenStats, compute_dtype
from slm_kernels.rows import weighted_rows

BLOCK_ELEMENTS = 2**20


def _block_rows(logits: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // logits.shape[1])


@custom_op("slm_kernels::logits_stats", mutates_args=())
def _logits_stats(
    logits: Tensor, targets: Tensor, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits)
    stats = empty_stats(targets, dtype, want_entropy)
    valid = (targets >= 0).nonzero().squeeze(1)
    for mine in row_blocks(len(valid), _block_rows(logits)):
        rows = valid[mine]
        z = logits.index_select(0, rows).to(dtype)
        tiles = [(0, z, torch.empty_like(z))]
        write_rows(stats, rows, stats_of_tiles(tiles, targets[rows], dtype, want_entropy))
    entropy = stats.loss.new_empty(0) if stats.entropy is None else stats.entropy
    return stats.loss, stats.row_max, stats.sum_exp, entropy


@_logits_stats.register_fake
def _(logits, targets, want_entropy):
    column = logits.new_empty(len(targets), dtype=compute_dtype(logits))
    entropy = torch.empty_like(column) if want_entropy else column.new_empty(0)
    return column, torch.empty_like(column), torch.empty_like(column), entropy


@custom_op("slm_kernels::logits_gradient", mutates_args=())
def _logits_gradient(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    loss: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
) -> Tensor:
    per_token = (targets, token_weight, loss, row_max, sum_exp)
    weighted = weighted_rows(upstream, *per_token, softcap=None, capacity=None)
    gradient = logits.new_zeros(logits.shape)
    for mine in row_blocks(len(weighted.positions), _block_rows(logits)):
        rows = weighted.part(mine)
        z = logits.index_select(0, rows.positions).to(compute_dtype(logits))
        z = logit_gradient_(z, 0, rows).mul_(rows.scale[:, None])
        gradient.index_copy_(0, rows.positions, z.to(logits.dtype))
    return gradient


@_logits_gradient.register_fake
def _(upstream, logits, targets, token_weight, loss, row_max, sum_exp):
    return logits.new_empty(logits.shape)


@custom_op("slm_kernels::logits_weighted_sum", mutates_args=())
def _logits_weighted_sum(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    loss: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
) -> Tensor:
    return (token_weight * loss).sum()


@_logits_weighted_sum.register_fake
def _(logits, targets, token_weight, loss, row_max, sum_exp):
    return loss.new_empty(())


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return (_logits_gradient(upstream, *ctx.saved_tensors), *[None] * 5)


_logits_weighted_sum.register_autograd(_backward, setup_context=_save)


def token_stats(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,), -1 where ignored
    want_entropy: bool,
) -> TokenStats:
    *stats, entropy = _logits_stats(logits, targets, want_entropy)
    return TokenStats(*stats, entropy=entropy if want_entropy else None, correct=None)


def weighted_sum(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    stats: TokenStats,
) -> Tensor:  # ()
    """Differentiable sum of token_weight * token_loss."""
    per_token = (stats.loss, stats.row_max, stats.sum_exp)
    return _logits_weighted_sum(logits, targets, token_weight, *per_token)
