"""Which tokens to train on: exactly the K candidates with the highest score (Rho-1, Eq 5).

Scores become integers in the same order, so ties, -0.0 and NaN have one answer on every device.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

SCOPES = ("sequence", "batch", "global")
DIGIT_BITS = 16


def select_count(
    num_candidates: Tensor,  # (...), int64
    select_ratio: float,
) -> Tensor:  # (...), int64
    """K = clamp(floor(select_ratio * num_candidates + 0.5), 1, num_candidates); none of none.

    It depends on counts alone, so a trainer can add up the denominator of a whole step before the
    first micro-batch. Raises ValueError where select_ratio is outside (0, 1].
    """
    check_select_ratio(select_ratio)
    count = torch.floor(num_candidates.double() * select_ratio + 0.5).long()
    return torch.minimum(count.clamp(min=1), num_candidates)


def count_of(num_candidates: int, select_ratio: float) -> int:
    """`select_count` of a number that is known."""
    return min(max(math.floor(num_candidates * select_ratio + 0.5), 1), num_candidates)


def max_selected(
    shape: Sequence[int],  # (..., T)
    select_ratio: float,
    scope: str,
) -> int | None:
    """Most tokens that `select_top_k` can select in a call of this shape; the device is not asked.

    None for "global": one rank may hold all that is selected.
    """
    if scope == "global":
        return None
    size = math.prod(shape)
    if scope == "batch":
        return count_of(size, select_ratio)
    return size // max(1, shape[-1]) * count_of(shape[-1], select_ratio)


def select_top_k(
    scores: Tensor,  # (..., T), float32 or float64
    candidates: Tensor,  # (..., T), bool
    select_ratio: float,
    *,
    scope: str = "batch",
    group: ProcessGroup | None = None,
) -> Tensor:  # (..., T), bool
    """Select the `select_count` candidates with the highest scores (Rho-1, arXiv 2404.07965, Eq 5).

    `scope` says among which tokens: "sequence" (each row along the last axis), "batch" (this
    call), or "global" (this call on every rank of `group`, which only this scope uses; every rank
    must call). Ties go to the lower rank, then the lower position. -0.0 ties with 0.0; NaN counts
    as the highest score, so that a broken model is not passed over in silence.

    Raises ValueError for a ratio outside (0, 1], an unknown scope, a global scope without a
    group, shapes that differ, scores that are not float32 or float64, candidates that are not bool.
    """
    check_select_ratio(select_ratio)
    check_scope(scope, group)
    _check_scores(scores, candidates)
    keys = _rank_keys(scores, candidates)
    if scope == "sequence":
        return _select_in_rows(keys, candidates, select_ratio)
    keys, flat = keys.reshape(-1), candidates.reshape(-1)
    if group is not None and scope == "global":
        return _select_in_group(keys, flat, select_ratio, group).view(scores.shape)
    return _select_in_rows(keys, flat, select_ratio).view(scores.shape)


def check_select_ratio(select_ratio: float) -> None:
    if not 0.0 < select_ratio <= 1.0:
        raise ValueError(f"select_ratio must lie in (0, 1], got {select_ratio}")


def check_scope(scope: str, group: ProcessGroup | None) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "global" and group is None:
        raise ValueError(
            "scope 'global' ranks the tokens of a process group, got group=None: pass "
            "torch.distributed.group.WORLD, or use scope 'batch' in a single process"
        )


def _check_scores(scores: Tensor, candidates: Tensor) -> None:
    if scores.shape != candidates.shape or scores.ndim == 0:
        raise ValueError(
            "scores and candidates must have the same shape, of one axis at least, got "
            f"{tuple(scores.shape)} and {tuple(candidates.shape)}"
        )
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores must be float32 or float64, got {scores.dtype}")
    if candidates.dtype != torch.bool:
        raise ValueError(f"candidates must be bool, got {candidates.dtype}")


def _rank_keys(
    scores: Tensor,  # (..., T)
    candidates: Tensor,  # (..., T)
) -> Tensor:  # (..., T), int32 or int64
    """Integers ordered as the scores: NaN above all of them, no candidate below all of them."""
    integer = torch.int32 if scores.dtype == torch.float32 else torch.int64
    limits = torch.iinfo(integer)
    bits = torch.where(scores == 0, 0.0, scores).view(integer)
    keys = torch.where(bits < 0, bits ^ limits.max, bits)
    return keys.masked_fill(scores.isnan(), limits.max).masked_fill(~candidates, limits.min)


def _select_in_rows(
    keys: Tensor,  # (..., T)
    candidates: Tensor,  # (..., T)
    select_ratio: float,
) -> Tensor:  # (..., T)
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    count = select_count(candidates.sum(dim=-1, keepdim=True), select_ratio)
    taken = torch.arange(keys.shape[-1], device=keys.device) < count
    return torch.zeros_like(candidates).scatter_(-1, order, taken)


def _select_in_group(
    keys: Tensor,  # (N,)
    candidates: Tensor,  # (N,)
    select_ratio: float,
    group: ProcessGroup,
) -> Tensor:  # (N,)
    """Radix selection: find the K-th key of all ranks, 16 bits at a time, by summed histograms.

    No score leaves its rank; a round moves 65,536 counts, and float32 scores need two rounds.
    """
    limits = torch.iinfo(keys.dtype)
    unsigned = (keys ^ limits.min).long()  # the lowest `limits.bits` of it, read as unsigned
    remaining = select_count(_sum_over(group, candidates.sum()), select_ratio)
    selected, ties = torch.zeros_like(candidates), candidates
    for shift in range(limits.bits - DIGIT_BITS, -1, -DIGIT_BITS):
        digit = (unsigned >> shift) & (2**DIGIT_BITS - 1)
        histogram = digit.new_zeros(2**DIGIT_BITS).scatter_add_(0, digit, ties.long())
        histogram = _sum_over(group, histogram)
        above = histogram.flip(0).cumsum(0).flip(0) - histogram  # keys with a higher digit
        boundary = (above >= remaining).sum().clamp(max=2**DIGIT_BITS - 1)
        selected = selected | (ties & (digit > boundary))
        ties = ties & (digit == boundary)
        remaining = remaining - above.gather(0, boundary[None])[0]
    return selected | _first_ties(ties, remaining, group)


def _first_ties(
    ties: Tensor,  # (N,), bool: has the K-th key
    remaining: Tensor,  # (), how many of all ranks' ties to take
    group: ProcessGroup,
) -> Tensor:  # (N,), bool
    rank = dist.get_rank(group)
    per_rank = remaining.new_zeros(dist.get_world_size(group))
    per_rank[rank] = ties.sum()
    before = _sum_over(group, per_rank)[:rank].sum()
    return ties & (before + ties.cumsum(0) <= remaining)


def _sum_over(group: ProcessGroup, counts: Tensor) -> Tensor:
    total = counts.clone()
    dist.all_reduce(total, group=group)
    return total
