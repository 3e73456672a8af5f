"""The rows that take part in the backward pass: gathered, so that the others cost nothing."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class WeightedRows(NamedTuple):
    """The K rows with a weight, and what their logit gradients are made of.

    Padding, where K is a capacity known beforehand, has position N and a scale of 0.
    """

    positions: Tensor  # (K,), among the N
    targets: Tensor  # (K,)
    row_max: Tensor  # (K,)
    scale: Tensor  # (K,), upstream gradient * token_weight / sum_exp
    at_target: Tensor  # (K,), (p - 1) * sum_exp * slope of the soft cap, where p = exp(-loss)
    padded: bool

    def part(self, mine: slice) -> "WeightedRows":
        return WeightedRows(
            self.positions[mine],
            self.targets[mine],
            self.row_max[mine],
            self.scale[mine],
            self.at_target[mine],
            self.padded,
        )

    def gather(
        self,
        values: Tensor,  # (N, D)
    ) -> Tensor:  # (K, D), zero rows for padding
        if not self.padded:
            return values.index_select(0, self.positions)
        taken = values.index_select(0, self.positions.clamp(max=len(values) - 1))
        return taken.masked_fill_((self.positions == len(values))[:, None], 0)

    def scatter(
        self,
        values: Tensor,  # (K, D)
        like: Tensor,  # (N, D)
    ) -> Tensor:  # (N, D), exactly zero in the rows without a weight
        size = (len(like) + self.padded, like.shape[1])
        out = like.new_zeros(size).index_copy_(0, self.positions, values.to(like.dtype))
        return out[: len(like)]


def weighted_rows(
    upstream: Tensor,  # ()
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    loss: Tensor,  # (N,)
    row_max: Tensor,  # (N,)
    sum_exp: Tensor,  # (N,)
    softcap: float | None,
    capacity: int | None,
) -> WeightedRows:
    """Without a `capacity` their number is read back from the device."""
    weighted = (token_weight != 0) & (targets >= 0)
    if capacity is None:
        positions = weighted.nonzero().squeeze(1)
    else:
        positions = _positions(weighted, min(capacity, len(targets)))
    at_target = torch.expm1(-loss) * sum_exp
    if softcap is not None:
        target_logit = row_max + (sum_exp.log() - loss)
        at_target = at_target * (1 - (target_logit / softcap).square())
    scale = upstream * token_weight / sum_exp
    padding = ((targets, -1), (row_max, torch.inf), (scale, 0.0), (at_target, 0.0))
    columns = (F.pad(column, (0, 1), value=value)[positions] for column, value in padding)
    return WeightedRows(positions, *columns, padded=capacity is not None)


def _positions(
    weighted: Tensor,  # (N,), bool
    capacity: int,
) -> Tensor:  # (capacity,), N for padding
    slot = torch.where(weighted, weighted.cumsum(0) - 1, capacity).clamp(max=capacity)
    numbers = torch.arange(len(weighted), device=weighted.device)
    padded = numbers.new_full((capacity + 1,), len(weighted))
    return padded.scatter_(0, slot, numbers)[:capacity]
