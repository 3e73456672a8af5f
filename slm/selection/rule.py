"""What every rule is: a `Selection`, that makes a `Choice` of each batch; `Ranked`: a share."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from slm.checks import check_value, number, word
from slm.errors import UserError
from slm.selection.schedules import RatioSchedule, ratio_schedule
from slm.store.windows import IGNORE_INDEX, WEIGHT, Batch
from slm_kernels import max_selected, select_count, select_top_k

SCOPES = ("sequence", "batch", "global")
SCOPE = word(*SCOPES)
TokenWeight = Tensor | Callable[..., Tensor]  # (B, T), or what makes it of the token losses
ENTROPY = "entropy"  # in the batch of a rule with needs_entropy: (B, T) nats


class Choice(NamedTuple):
    """What a rule says of one batch."""

    token_weight: Tensor  # (B, T), bool or floating point; 0: not trained on. The rule's alone
    selected: Tensor  # (B, T), bool
    threshold: Tensor | None  # lowest score selected: (), or (B,) with scope=sequence


class Selection:
    """A selection rule.

    A corpus may give its tokens weights: `deferred` multiplies by them, no rule looks at them.

    needs:             columns of the batch beyond ids and targets
    needs_token_loss:  False: the choice can be made before the forward pass
    needs_entropy:     whether `choose` wants the entropy of the model's predictions, in the batch
    reads_window:      whether it looks at the columns `window` and `epoch`
    divides_by:        the loss's denominator over the whole optimizer step: the number of
                       "selected" or of "valid" tokens
    picks_tokens:      False: what it selects says nothing of a token, for it takes all, any by
                       chance, or weighs them
    short_context:     its reference must be the corpus scored with a short context
    replaces:          what it does not select is no input either: the model reads an added token
    """

    needs: ClassVar[tuple[str, ...]] = ()
    needs_token_loss: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False
    reads_window: ClassVar[bool] = False
    divides_by: ClassVar[str] = "selected"
    picks_tokens: ClassVar[bool] = True
    short_context: ClassVar[bool] = False
    scope: str = "batch"

    @property
    def replaces(self) -> bool:
        return False

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        raise NotImplementedError

    def read(self, batch: Batch, choice: Choice, added_id: int) -> Batch:
        """The batch as the model reads it in training, of a rule that replaces inputs.

        A window's first input is no target of it, and goes as the first target does.
        """
        gone = self.candidates(batch) & ~choice.selected
        gone = torch.cat([gone[:, :1], gone[:, :-1]], dim=1)  # from targets to the inputs
        return batch | {"input_ids": batch["input_ids"].masked_fill(gone, added_id)}

    def deferred(self, batch: Batch, tokens_seen: int) -> tuple[TokenWeight, list[Choice]]:
        """The token weights as the loss takes them, and where the choice is once it is made.

        What the rule gives a token, times the `token_weight` that the batch has of it: the rule
        chooses as without, and what the loss is divided by stays a number of tokens. The loss
        calls what it is given with the token losses, and with the entropies of `needs_entropy`.
        """
        made: list[Choice] = []

        def choose(token_loss: Tensor | None, entropy: Tensor | None = None) -> Tensor:
            seen = batch if entropy is None else batch | {ENTROPY: entropy}
            made.append(self.choose(seen, token_loss, tokens_seen))
            return times_weight(made[-1].token_weight, batch)

        return choose if self.needs_token_loss else choose(None), made

    def divisor(self, num_candidates: Tensor, tokens_seen: int) -> Tensor:
        """What rankings of so many candidates add to the loss's denominator, before they are made.

        UserError of a rule whose choice alone tells.
        """
        if self.divides_by == "valid":
            return num_candidates
        raise UserError(
            f"{type(self).__name__} has to choose before it is known how many tokens its loss is "
            "divided by"
        )

    def max_rows(self, batch: Batch, tokens_seen: int) -> int | None:
        """Most tokens of this batch that can get a weight; None: ask the device."""
        return batch["targets"].numel()

    @cached_property
    def schedules(self) -> tuple[RatioSchedule, ...]:
        """Of its ratios."""
        return ()

    def ratio(self, tokens_seen: int) -> float | None:
        """The select_ratio that is asked for; None for rules without one."""
        return None

    def takes_all(self, tokens_seen: int) -> bool:
        """Whether every candidate is selected, whatever its loss."""
        return self.ratio(tokens_seen) == 1

    def candidates(self, batch: Batch) -> Tensor:  # (B, T) bool
        """Targets that have every score that the rule needs; the data path refuses others."""
        found = batch["targets"] != IGNORE_INDEX
        for column in self.needs:
            found = found & ~batch[column].isnan()
        return found


@dataclass(frozen=True)
class Ranked(Selection):
    """Exactly K = select_ratio of the targets, those of the highest `score`, ties to the first; or,
    with the rule's own bound in its place, all that pass it, however many they are.

    select_ratio: the paper's k, in (0, 1], or a schedule over tokens (schedules.py)
    bound:        the field with the absolute threshold, max_... or min_..., in nats; empty: none
    """

    bound: ClassVar[str] = ""
    select_ratio: Any = None
    scope: str = "batch"  # type: ignore  # frozen here, and never set on the class above

    def __post_init__(self) -> None:
        check_value("selection.scope", self.scope, SCOPE)
        if self.limit is None:
            self.schedule.at(0)
        elif self.select_ratio is not None:
            raise UserError(
                f"selection.select_ratio is {self.select_ratio} and selection.{self.bound} is "
                f"{getattr(self, self.bound)}: a share or a bound, so one of them must be null"
            )

    @cached_property
    def limit(self) -> float | None:
        """The lowest score that passes; None where a share is taken."""
        value = getattr(self, self.bound) if self.bound else None
        if value is None:
            return None
        check_value(f"selection.{self.bound}", value, number)
        return -value if self.bound.startswith("max") else value

    @cached_property
    def schedule(self) -> RatioSchedule:
        return ratio_schedule(self.select_ratio)

    @cached_property
    def schedules(self) -> tuple[RatioSchedule, ...]:
        return (self.schedule,) if self.limit is None else ()

    def ratio(self, tokens_seen: int) -> float | None:
        return self.schedule.at(tokens_seen) if self.limit is None else None

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:  # (B, T), high: kept
        raise NotImplementedError

    def choose(self, batch: Batch, token_loss: Tensor | None, tokens_seen: int) -> Choice:
        score, candidates = self.score(batch, token_loss), self.candidates(batch)
        if self.limit is None:
            selected = top_k(score, candidates, self.schedule.at(tokens_seen), self.scope)
        else:
            selected = candidates & (score >= self.limit)
        return Choice(selected, selected, lowest(score, selected, self.scope))

    def divisor(self, num_candidates: Tensor, tokens_seen: int) -> Tensor:
        if self.limit is not None:
            return super().divisor(num_candidates, tokens_seen)
        return select_count(num_candidates, self.schedule.at(tokens_seen))

    def max_rows(self, batch: Batch, tokens_seen: int) -> int | None:
        if self.limit is not None:
            return None
        return max_selected(batch["targets"].shape, self.schedule.at(tokens_seen), self.scope)


def times_weight(chosen: Tensor, batch: Batch) -> Tensor:  # (B, T)
    """0 where the rule says 0, whatever stands in the batch there: padding has NaN."""
    if WEIGHT not in batch:
        return chosen
    return (chosen * batch[WEIGHT]).masked_fill(chosen == 0, 0.0)


def given(token_loss: Tensor | None) -> Tensor:
    assert token_loss is not None, "this rule needs the token losses"
    return token_loss


def excess_loss(batch: Batch, token_loss: Tensor | None) -> Tensor:  # (B, T) nats
    return given(token_loss) + batch["reference_logprob"]


# The processes with windows of their own, where others share layers out with them.
RANKED: ContextVar[Any] = ContextVar("RANKED", default=None)


def group(scope: str) -> Any:
    """The processes that rank together; None: this one alone."""
    is_one = scope != "global" or not dist.is_initialized()
    return None if is_one else RANKED.get() or dist.group.WORLD


def top_k(score: Tensor, candidates: Tensor, select_ratio: float, scope: str) -> Tensor:
    """`slm_kernels.select_top_k`; a single process is a group of one."""
    ranks = group(scope)
    within = "batch" if scope == "global" and ranks is None else scope
    return select_top_k(score, candidates, select_ratio, scope=within, group=ranks)


def lowest(score: Tensor, selected: Tensor, scope: str) -> Tensor:  # () or (B,)
    """Lowest selected score on this rank; inf where nothing was selected."""
    scores = score.where(selected, torch.inf)
    return scores.amin(-1) if scope == "sequence" else scores.amin()
