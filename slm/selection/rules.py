"""Which tokens are trained on, and with what weight: a small frozen dataclass a rule.

A rule is a pure function of the batch, of the token losses where it asks for them, and of the
tokens seen. What a rule keeps, and from where:

    All                 every target                                       Rho-1, Eq 2
    Excess              HIGH token_loss - reference_loss                    Rho-1, Eq 3 to 5
    Random              as many, drawn by a hash                            the control
    Loss                HIGH token_loss, no reference                       ESLM, arXiv 2505.19893
    ReferenceLoss       LOW reference_loss                                  Rho-1, section 3.4
    ReferenceEntropy    LOW entropy of the reference's prediction           Rho-1, Eq 8
    Intersection, Union of the two before                                   Rho-1, appendix H
    Middle              the middle of the token losses, both tails dropped
    Entropy             HIGH entropy of the model's own prediction          SE-KD, arXiv 2602.01395
    Overconfident       HIGH excess loss where that entropy is LOW          TIP, arXiv 2604.14084
    LongGain            HIGH loss of a short context - token_loss           LongCE, arXiv 2410.23771
    Forget              LOW log p_domain - log p_general                    arXiv 2601.21571
    Probability         weights p^power of the model itself, no reference   DFT, arXiv 2508.05629
    Sigmoid, Softmax, Relu   weights that grow with the excess loss         soft selection
    Mixture             clm_weight * All + (1 - clm_weight) * Excess        Rho-1, appendix C

Excess, Loss, ReferenceLoss, ReferenceEntropy, Entropy, LongGain and Forget take a bound in nats in
place of a share:
ReferenceLoss(max_loss=0.916) keeps what the reference finds likely (STM, arXiv 2501.14315).

`scope` says among which tokens a ranking is made: "sequence" (each window), "batch" (the windows
of one forward on one rank) or "global" (those of all ranks). Only "sequence" chooses the same
tokens however a step is split into micro-batches and ranks.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slm.checks import Kind, check_value, real, whole
from slm.errors import UserError
from slm.selection.rule import (
    ENTROPY,
    SCOPE,
    Choice,
    Ranked,
    Selection,
    excess_loss,
    given,
    lowest,
    top_k,
)
from slm.selection.schedules import RatioSchedule, ratio_schedule
from slm.store.windows import Batch
from slm_kernels import max_selected, select_count

SEED = Kind("an integer of 64 bits", whole(-(2**63)).fits)


@dataclass(frozen=True)
class All(Selection):
    """Every token: causal language modeling (Rho-1, Eq 2); it trains the reference too."""

    divides_by = "valid"

    picks_tokens = False

    def takes_all(self, tokens_seen: int) -> bool:
        return True

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        valid = self.candidates(batch)
        return Choice(valid, valid, None)


# ---- a share of the tokens, by rank -------------------------------------------------------------


@dataclass(frozen=True)
class Excess(Ranked):
    """The highest excess loss (Rho-1, Eq 3 to 5)."""

    needs = ("reference_logprob",)
    needs_token_loss = True
    bound = "min_excess"
    min_excess: float | None = field(default=None, kw_only=True)

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        return excess_loss(batch, token_loss)


@dataclass(frozen=True)
class Loss(Ranked):
    """The highest token loss of the model itself; no reference."""

    needs_token_loss = True
    bound = "min_loss"
    min_loss: float | None = field(default=None, kw_only=True)

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        return given(token_loss)


@dataclass(frozen=True)
class ReferenceLoss(Ranked):
    """The LOWEST reference loss: what the reference expects (Rho-1, section 3.4).

    With max_loss 0.916, a perplexity of 2.5, the rule of STM (arXiv 2501.14315), whose reference is
    the model that training starts from.
    """

    needs = ("reference_logprob",)
    bound = "max_loss"
    max_loss: float | None = field(default=None, kw_only=True)

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        return batch["reference_logprob"]


@dataclass(frozen=True)
class ReferenceEntropy(Ranked):
    """The LOWEST entropy of the reference's prediction: where it is sure (Rho-1, Eq 8)."""

    needs = ("reference_entropy",)
    bound = "max_entropy"
    max_entropy: float | None = field(default=None, kw_only=True)

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        return -batch["reference_entropy"]


@dataclass(frozen=True)
class Entropy(Ranked):
    """The HIGHEST entropy of the model's own prediction, where it is unsure; no reference.

    SE-KD (arXiv 2602.01395) selects positions of distillation so, with scope "sequence".
    """

    needs_token_loss = True
    needs_entropy = True
    bound = "min_entropy"
    min_entropy: float | None = field(default=None, kw_only=True)

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        return batch[ENTROPY]


@dataclass(frozen=True)
class Overconfident(Ranked):
    """The highest excess loss among the share `low_entropy` of the lowest entropy: sure and wrong.

    TIP (arXiv 2604.14084) has the teacher's divergence where this has the excess loss. select_ratio
    is a share of all candidates, like that of other rules, so at most `low_entropy`.
    """

    needs = ("reference_logprob",)
    needs_token_loss = True
    needs_entropy = True
    low_entropy: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("selection.low_entropy", self.low_entropy, real(0, 1, "(]"))
        if (most := max(ratio for _, ratio in self.schedule.points)) > self.low_entropy:
            raise UserError(
                f"selection.select_ratio is {most:g} and selection.low_entropy is "
                f"{self.low_entropy:g}: no more can be taken of all tokens than have low entropy"
            )

    def within(self, tokens_seen: int) -> float:
        """The share of the tokens of low entropy."""
        return self.schedule.at(tokens_seen) / self.low_entropy

    def takes_all(self, tokens_seen: int) -> bool:
        return self.ratio(tokens_seen) == self.low_entropy == 1

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        sure = top_k(-batch[ENTROPY], self.candidates(batch), self.low_entropy, self.scope)
        excess = excess_loss(batch, token_loss)
        selected = top_k(excess, sure, self.within(tokens_seen), self.scope)
        return Choice(selected, selected, lowest(excess, selected, self.scope))

    def divisor(self, num_candidates: Tensor, tokens_seen: int) -> Tensor:
        sure = select_count(num_candidates, self.low_entropy)
        return select_count(sure, self.within(tokens_seen))

    def max_rows(self, batch: Batch, tokens_seen: int) -> int | None:
        limit = super().max_rows(batch, tokens_seen)
        return None if limit is None else limit + len(batch["targets"])  # one more a ranking


@dataclass(frozen=True)
class Random(Ranked):
    """As many tokens as the other rules, drawn by a hash: the control at equal budget.

    The score of a token depends on (seed, epoch, window, position) alone, not on how a step is
    split, and differs between passes over the corpus.
    """

    picks_tokens = False
    reads_window = True
    seed: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("selection.seed", self.seed, SEED)

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        length = batch["targets"].shape[1]
        return hashed_scores(batch["window"], batch["epoch"], length, self.seed)


@dataclass(frozen=True)
class Middle(Ranked):
    """The middle of the token losses: as many dropped from the top as from the bottom.

    Keeps K or one token more or less, since each tail is rounded.
    """

    needs_token_loss = True

    def shares(self, tokens_seen: int) -> tuple[float, float]:
        """What stays without the top, and of that without the bottom."""
        ratio = self.schedule.at(tokens_seen)
        return (1 + ratio) / 2, 2 * ratio / (1 + ratio)

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        losses, (first, second) = given(token_loss), self.shares(tokens_seen)
        without_top = top_k(-losses, self.candidates(batch), first, self.scope)
        selected = top_k(losses, without_top, second, self.scope)
        return Choice(selected, selected, lowest(losses, selected, self.scope))

    def divisor(self, num_candidates: Tensor, tokens_seen: int) -> Tensor:
        first, second = self.shares(tokens_seen)
        return select_count(select_count(num_candidates, first), second)

    def max_rows(self, batch: Batch, tokens_seen: int) -> int | None:
        limit = super().max_rows(batch, tokens_seen)
        return None if limit is None else limit + len(batch["targets"])  # one more a ranking


# ---- two rankings by the reference --------------------------------------------------------------


@dataclass(frozen=True)
class Intersection(Selection):
    """Low reference loss AND low reference entropy (Rho-1, Table 4); the share comes out."""

    needs = ("reference_logprob", "reference_entropy")
    loss_ratio: Any
    entropy_ratio: Any
    scope: str = "batch"  # type: ignore  # frozen here, and never set on the class above

    def __post_init__(self) -> None:
        check_value("selection.scope", self.scope, SCOPE)
        assert len(self.schedules) == 2  # raises where a ratio is no ratio

    @cached_property
    def schedules(self) -> tuple[RatioSchedule, ...]:
        return (
            ratio_schedule(self.loss_ratio, "selection.loss_ratio"),
            ratio_schedule(self.entropy_ratio, "selection.entropy_ratio"),
        )

    def both(self, batch: Batch, tokens_seen: int) -> tuple[Tensor, Tensor]:
        loss_ratio, entropy_ratio = (schedule.at(tokens_seen) for schedule in self.schedules)
        by_loss = top_k(batch["reference_logprob"], self.candidates(batch), loss_ratio, self.scope)
        by_entropy = top_k(
            -batch["reference_entropy"], self.candidates(batch), entropy_ratio, self.scope
        )
        return by_loss, by_entropy

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        by_loss, by_entropy = self.both(batch, tokens_seen)
        return Choice(by_loss & by_entropy, by_loss & by_entropy, None)

    def max_rows(self, batch: Batch, tokens_seen: int) -> int | None:
        ratio = min(schedule.at(tokens_seen) for schedule in self.schedules)
        return max_selected(batch["targets"].shape, ratio, self.scope)


@dataclass(frozen=True)
class Union(Intersection):
    """Low reference loss OR low reference entropy."""

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        by_loss, by_entropy = self.both(batch, tokens_seen)
        return Choice(by_loss | by_entropy, by_loss | by_entropy, None)

    def max_rows(self, batch: Batch, tokens_seen: int) -> int | None:
        return batch["targets"].numel()


# ---- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture(Ranked):
    """clm_weight * CLM + (1 - clm_weight) * SLM, against the drift of what is not selected.

    The paper suggests it in appendix C. The CLM term is weighted by the paper's own normaliser
    N * k, which differs from K by rounding; the denominator is the number selected.
    """

    needs = ("reference_logprob",)
    needs_token_loss = True
    clm_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("selection.clm_weight", self.clm_weight, real(0, 1, "()"))

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        return excess_loss(batch, token_loss)

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        choice = super().choose(batch, token_loss, tokens_seen)
        everywhere = self.clm_weight * self.schedule.at(tokens_seen)
        weight = everywhere + (1 - self.clm_weight) * choice.selected.float()
        return choice._replace(token_weight=weight.masked_fill(~self.candidates(batch), 0.0))

    def max_rows(self, batch: Batch, tokens_seen: int) -> int | None:
        return batch["targets"].numel()


# ---- what the rules are made of -----------------------------------------------------------------


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
