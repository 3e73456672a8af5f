"""Soft selection: a weight for every token instead of a choice."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slm.checks import check_value, optional, real
from slm.selection.rule import SCOPE, Choice, Selection, excess_loss, given, group
from slm.store.windows import Batch

POSITIVE = real(0, ends="()")
CAP = optional(POSITIVE)


@dataclass(frozen=True)
class Soft(Selection):
    """A weight for every token that grows with its excess loss; the gradient does not pass it.

    temperature:  nats
    """

    needs = ("reference_logprob",)
    needs_token_loss = True
    divides_by = "valid"
    picks_tokens = False
    temperature: float

    def __post_init__(self) -> None:
        check_value("selection.temperature", self.temperature, POSITIVE)

    def weight(self, scaled: Tensor, valid: Tensor) -> Tensor:  # (B, T) excess / temperature
        raise NotImplementedError

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        valid = self.candidates(batch)
        scaled = (excess_loss(batch, token_loss) / self.temperature).masked_fill(~valid, 0.0)
        token_weight = self.weight(scaled, valid).masked_fill(~valid, 0.0)
        return Choice(token_weight, token_weight > 0, None)


@dataclass(frozen=True)
class Sigmoid(Soft):
    """sigmoid(excess / temperature), between 0 and 1."""

    def weight(self, scaled: Tensor, valid: Tensor) -> Tensor:
        return scaled.sigmoid()


@dataclass(frozen=True)
class Relu(Soft):
    """excess / temperature where it is positive, at most `cap`: an outlier must not rule a step."""

    cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("selection.cap", self.cap, CAP)

    def weight(self, scaled: Tensor, valid: Tensor) -> Tensor:
        return scaled.clamp(min=0.0, max=self.cap)


@dataclass(frozen=True)
class Softmax(Soft):
    """softmax(excess / temperature) times the number of targets, per `scope`, at most `cap`.

    Without a cap the weights of a scope sum to its number of targets.
    """

    cap: float | None = None
    scope: str = "batch"  # type: ignore  # frozen here, and never set on the class above

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("selection.cap", self.cap, CAP)
        check_value("selection.scope", self.scope, SCOPE)

    def weight(self, scaled: Tensor, valid: Tensor) -> Tensor:
        shape = scaled.shape
        rows = (len(scaled), -1) if self.scope == "sequence" else (1, -1)
        weight = softmax_sums_to_count(scaled.reshape(rows), valid.reshape(rows), group(self.scope))
        return weight.reshape(shape).clamp(max=self.cap) if self.cap else weight.reshape(shape)


@dataclass(frozen=True)
class Probability(Selection):
    """p^power of the model itself, which the gradient does not pass; no reference.

    Dynamic fine-tuning (DFT, arXiv 2508.05629, Eq 9) with a power of 1: what the model finds
    unlikely, and would move it most, counts least. The loss is divided by the number of targets.
    """

    needs_token_loss = True
    divides_by = "valid"
    picks_tokens = False
    power: float = 1.0

    def __post_init__(self) -> None:
        check_value("selection.power", self.power, POSITIVE)

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        valid = self.candidates(batch)
        token_weight = (-self.power * given(token_loss)).exp().masked_fill(~valid, 0.0)
        return Choice(token_weight, valid, None)


def softmax_sums_to_count(scaled: Tensor, valid: Tensor, ranks: Any) -> Tensor:  # (R, N)
    """softmax over the valid entries of each row, times their number; over all ranks' rows."""
    scaled = scaled.masked_fill(~valid, -torch.inf)
    largest, count = scaled.amax(-1, keepdim=True), valid.sum(-1, keepdim=True).to(scaled)
    if ranks is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks)
    exps = (scaled - largest.clamp(min=-1e30)).exp()  # a row without a target has no largest
    total = exps.sum(-1, keepdim=True)
    if ranks is not None:
        dist.all_reduce(count, group=ranks)
        dist.all_reduce(total, group=ranks)
    return exps * (count / total.clamp(min=torch.finfo(total.dtype).tiny))
