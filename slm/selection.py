"""Which tokens are trained on: a small frozen dataclass a rule, each a pure function of the batch.

A rule answers with the two arguments that `selective_cross_entropy` needs: the reference loss of
every candidate (NaN: no candidate) and the share of the candidates to keep. A rule that knows its
mask beforehand (all, random) makes the chosen tokens the candidates and keeps all of them.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slm.data import IGNORE_INDEX, Batch
from slm.errors import UserError
from slm_kernels import select_count, select_top_k

SCOPES = ("batch", "sequence")


class Criterion(NamedTuple):
    """The arguments of the selective loss."""

    reference_loss: Tensor  # (B, T) nats, NaN where a token is no candidate
    select_ratio: float


class Selection(Protocol):
    """A selection rule."""

    @property
    def select_ratio(self) -> float: ...
    @property
    def scope(self) -> str: ...
    @property
    def needs_references(self) -> bool: ...

    def criterion(self, batch: Batch) -> Criterion: ...


def num_selected(selection: Selection, valid_per_row: Tensor) -> Tensor:  # (A, B) -> ()
    """Number of tokens that the rule will select in A micro-batches of B rows, known beforehand."""
    counts = valid_per_row if selection.scope == "sequence" else valid_per_row.sum(1)
    return select_count(counts, selection.select_ratio).sum()


def check_selection(select_ratio: float, scope: str) -> None:
    if not isinstance(select_ratio, int | float) or not 0 < select_ratio <= 1:
        raise UserError(f"selection.select_ratio is {select_ratio}, it must be in (0, 1]")
    if scope not in SCOPES:
        raise UserError(f"selection.scope is {scope!r}, it must be one of {SCOPES}")


@dataclass(frozen=True)
class All:
    """Every token: causal language modeling (Rho-1, equation 2); it trains the reference too."""

    select_ratio = 1.0
    scope = "batch"
    needs_references = False

    def criterion(self, batch: Batch) -> Criterion:
        return Criterion(torch.zeros_like(batch["targets"], dtype=torch.float32), 1.0)


@dataclass(frozen=True)
class Excess:
    """The tokens of highest excess loss, token_loss - reference_loss (Rho-1, equations 3 to 5)."""

    select_ratio: float
    scope: str = "batch"
    needs_references = True

    def __post_init__(self) -> None:
        check_selection(self.select_ratio, self.scope)

    def criterion(self, batch: Batch) -> Criterion:
        return Criterion(-batch["reference_logprob"], self.select_ratio)


@dataclass(frozen=True)
class Random:
    """As many tokens as `Excess`, drawn by a hash: the control at equal budget.

    The score of a token depends on (seed, epoch, window, position) alone, so the choice is the same
    for any number of ranks, and differs between passes over the corpus.
    """

    select_ratio: float
    seed: int
    scope: str = "batch"
    needs_references = False

    def __post_init__(self) -> None:
        check_selection(self.select_ratio, self.scope)

    def criterion(self, batch: Batch) -> Criterion:
        scores = hashed_scores(
            batch["window"], batch["epoch"], batch["targets"].shape[1], self.seed
        )
        candidates = batch["targets"] != IGNORE_INDEX
        chosen = select_top_k(scores, candidates, self.select_ratio, scope=self.scope)
        nothing = torch.full_like(scores, torch.nan, dtype=torch.float32)
        return Criterion(nothing.masked_fill(chosen, 0.0), 1.0)


def hashed_scores(window: Tensor, epoch: Tensor, length: int, seed: int) -> Tensor:
    """Uniform float64 scores in [0, 1), (B, length), from (B,) windows and epochs."""
    position = torch.arange(length, device=window.device)
    state = mix(mix(mix(mix(torch.full_like(window, seed)) + window) + epoch)[:, None] + position)
    return shift_right(state, 11).double() * 2.0**-53


def shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift; torch shifts int64 arithmetically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): int64 -> well-mixed int64, wrapping."""
    value = value - 0x61C8864680B583EB  # the golden gamma, as a signed number
    value = (value ^ shift_right(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ shift_right(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ shift_right(value, 31)
