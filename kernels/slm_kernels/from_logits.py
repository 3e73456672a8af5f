"""The same two functions over logits that somebody else made, for trainers that only expose those.

The logits and their gradient exist in full, as they must; beyond them memory is a few rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from slm_kernels.chunked import (
    empty_stats,
    logit_gradient_,
    row_blocks,
    rows_with_weight,
    stats_of_tiles,
    write_rows,
)
from slm_kernels.reference import TokenStats, compute_dtype

BLOCK_ELEMENTS = 2**20


def _block_rows(logits: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // logits.shape[1])


def token_stats(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,), -1 where ignored
) -> TokenStats:
    dtype = compute_dtype(logits)
    stats = empty_stats(targets, dtype, want_entropy=False)
    valid = (targets >= 0).nonzero().squeeze(1)
    for mine in row_blocks(len(valid), _block_rows(logits)):
        rows = valid[mine]
        z = logits.index_select(0, rows).to(dtype)
        write_rows(stats, rows, stats_of_tiles([(0, z)], targets[rows], dtype, want_entropy=False))
    return stats


class _WeightedSum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (N, V)
        targets: Tensor,  # (N,)
        token_weight: Tensor,  # (N,)
        stats: TokenStats,
    ) -> Tensor:  # ()
        per_token = (targets, token_weight, stats.loss, stats.row_max, stats.sum_exp)
        ctx.save_for_backward(logits, *per_token)
        return (token_weight * stats.loss).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator's signature
        ctx: Any,
        upstream: Tensor,  # ()
    ) -> tuple[Tensor | None, ...]:
        logits, *per_token = ctx.saved_tensors
        selected = rows_with_weight(upstream, *per_token)
        gradient = torch.zeros_like(logits)
        for mine in row_blocks(len(selected.positions), _block_rows(logits)):
            rows = selected.part(mine)
            z = logits.index_select(0, rows.positions).to(compute_dtype(logits))
            gradient.index_copy_(0, rows.positions, logit_gradient_(z, 0, rows).to(logits.dtype))
        return gradient, None, None, None


def weighted_sum(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    stats: TokenStats,
) -> Tensor:  # ()
    """Differentiable sum of token_weight * token_loss."""
    return _WeightedSum.apply(logits, targets, token_weight, stats)
