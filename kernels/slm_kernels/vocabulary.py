"""A head whose rows, the vocabulary, are cut over ranks: each makes the logits of its own alone.

Every rank has all hidden states and all targets, as tensor-parallel models do. A few numbers a
token are exchanged in the forward pass, the gradient of `hidden` in the backward pass, no logits.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from slm_kernels.contracts import TokenStats


class Part(NamedTuple):
    """What a rank has of the vocabulary."""

    group: ProcessGroup
    start: int  # its first token
    size: int  # how many it has
    vocab_size: int  # of all ranks

    def local(self, targets: Tensor) -> Tensor:  # (N,), -1 where ignored
        """As tokens of this part; `size`, which is none of them, where another has the target."""
        inside = (targets >= self.start) & (targets < self.start + self.size)
        return (targets - self.start).where(inside, self.size).where(targets >= 0, -1)

    def together(self, stats: TokenStats, targets: Tensor) -> TokenStats:
        """Of the whole vocabulary, from what each rank finds in its part with `local` targets."""
        valid, inside = targets >= 0, (targets >= 0) & (targets < self.size)
        log_sum = stats.sum_exp.log()
        target_logit = (stats.row_max + (log_sum - stats.loss)).where(inside, 0.0)
        row_max = self._reduced(stats.row_max.clone(), dist.ReduceOp.MAX)
        below = stats.row_max - row_max  # at most 0
        scale = below.exp()
        sums = [target_logit, stats.sum_exp * scale]
        if stats.entropy is not None:
            sum_exp_z = (log_sum - stats.entropy) * stats.sum_exp  # of exp(z - m) (z - m)
            sums.append((sum_exp_z + below * stats.sum_exp) * scale)
        target_logit, sum_exp, *rest = self._reduced(torch.stack(sums), dist.ReduceOp.SUM)
        sum_exp = sum_exp.where(valid, 1.0)
        entropy = None
        if stats.entropy is not None:
            entropy = (sum_exp.log() - rest[0] / sum_exp).clamp_(min=0).where(valid, 0.0)
        loss = ((row_max - target_logit) + sum_exp.log()).where(valid, 0.0)
        correct = stats.correct
        if correct is not None:
            correct = self._correct(correct & inside, stats.row_max == row_max)
        return TokenStats(loss, row_max, sum_exp, entropy, correct)

    def _correct(self, correct: Tensor, is_largest: Tensor) -> Tensor:  # (N,) bool
        """Whether the target is the first of the largest logits, of which several ranks may have
        one."""
        rank, none = dist.get_rank(self.group), dist.get_world_size(self.group)
        first = torch.where(is_largest, rank, none)
        first = self._reduced(first, dist.ReduceOp.MIN)
        found = (correct & (first == rank)).to(torch.uint8)
        return self._reduced(found, dist.ReduceOp.MAX).bool()

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        dist.all_reduce(values, op=how, group=self.group)
        return values


def part_of(weight: Tensor, group: ProcessGroup) -> Part:
    """Of a rank with these rows (v, D), which follow those of the ranks before it."""
    mine = torch.tensor([len(weight)], device=weight.device)
    counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    sizes = [int(count) for count in counts]
    rank = dist.get_rank(group)
    return Part(group, sum(sizes[:rank]), sizes[rank], sum(sizes))


def rows_here(tensor: Tensor | None) -> Tensor | None:
    """This rank's rows of a DTensor that is cut over the vocabulary; else the tensor itself."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(tensor, DTensor):
        return tensor
    if list(tensor.placements) != [Shard(0)]:
        raise ValueError(
            f"with vocab_group the head must be cut over its rows, got {tensor.placements}"
        )
    return tensor.to_local()


class _Summed(torch.autograd.Function):
    """The values themselves; each rank's gradient is of its part of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = upstream
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def summed_gradient(values: Tensor, group: ProcessGroup) -> Tensor:
    return _Summed.apply(values, group)  # type: ignore[no-any-return]
