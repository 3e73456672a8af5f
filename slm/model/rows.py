"""The rows that a weight selects of a batch: gathered, put back, and as queries of attention.

Letters: B windows, T positions, N = B * T, D width, H heads, K selected rows, W most of a window.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """The K rows with a weight in ascending order; padding, up to a capacity, is row N."""

    shape: tuple[int, int]  # B, T
    index: Tensor  # (K,)
    slots: Tensor  # (K,), where a row stands among the windows' queries, B * W
    queries: Tensor  # (B, W), which of the K rows is there; padding: any
    asked: Tensor  # (B, W), bool: no padding
    positions: Tensor  # (B, W), of the queries, in 0 .. T - 1
    padded: bool  # by a capacity, so that the index may name row N

    @property
    def num_rows(self) -> int:  # N
        return self.shape[0] * self.shape[1]

    def take(
        self,
        values: Tensor,  # (N, ...)
    ) -> Tensor:  # (K, ...), any row for padding
        return values.index_select(0, self.index.clamp(max=self.num_rows - 1))

    def gather(self, values: Any) -> Any:
        """(B, T, ...), or (1, T, ...) for all windows, to (1, K, ...); all else as it is."""
        windows, length = self.shape
        shapes = (windows, length), (1, length)
        if not isinstance(values, Tensor) or values.shape[:2] not in shapes:
            return values
        return self.take(values.expand(windows, *values.shape[1:]).flatten(0, 1))[None]

    def gather_gradient(
        self,
        values: Tensor,  # (B, T, ...)
    ) -> Tensor:  # (1, K, ...), zero for padding
        mine = self.gather(values)
        if not self.padded:
            return mine
        padding = (self.index == self.num_rows).view(1, -1, *[1] * (values.ndim - 2))
        return mine.masked_fill_(padding, 0)

    def scatter(
        self,
        values: Tensor,  # (1, K, D)
    ) -> Tensor:  # (B, T, D), exactly zero in the other rows
        out = values.new_zeros(self.num_rows + 1, values.shape[2])
        return out.index_copy_(0, self.index, values[0])[: self.num_rows].unflatten(0, self.shape)


def make_rows(
    selected: Tensor,  # (B, T), bool
    capacity: int | None = None,
) -> Rows:
    """Without a `capacity` their number is read back from the device."""
    (windows, length), flat, total = selected.shape, selected.flatten(), selected.numel()
    found = int(flat.sum()) if capacity is None else 0
    count = max(1, found if capacity is None else min(capacity, total))
    longest = max(1, int(selected.sum(1).max())) if capacity is None else min(count, length)
    numbers = torch.arange(total, device=flat.device)
    place = torch.where(flat, flat.cumsum(0) - 1, count).clamp(max=count)
    index = numbers.new_full((count + 1,), total).scatter_(0, place, numbers)[:count]
    rank = F.pad((selected.cumsum(1) - 1).flatten(), (0, 1))[index]
    slots = torch.where(index < total, index // length * longest + rank, windows * longest)
    queries = numbers.new_zeros(windows * longest + 1).scatter_(0, slots, numbers[:count])
    asked = torch.zeros_like(queries, dtype=torch.bool).scatter_(0, slots, True)
    queries, asked = (of[:-1].view(windows, longest) for of in (queries, asked))
    positions = (index.clamp(max=total - 1) % length)[queries]
    slots = slots.clamp(max=windows * longest - 1)
    return Rows((windows, length), index, slots, queries, asked, positions, count > found)


def seen(
    mask: Tensor | None,  # (1 or B, 1 or H, T, T); None: causal
    rows: Rows,
) -> Tensor:  # (B, 1 or H, W, T)
    positions, (windows, length) = rows.positions, rows.shape
    if mask is None:
        return torch.arange(length, device=positions.device) <= positions[:, None, :, None]
    index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, length)
    return mask.expand(windows, -1, -1, -1).gather(2, index)
