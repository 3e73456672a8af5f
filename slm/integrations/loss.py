"""The selective loss as the doors call it: any rule of slm.selection, one denominator for a step.

`labels` and score columns stand beside the tokens that they are about, as Hugging Face has it:
entry i is about token i. `shifted` moves them to the position that predicts.

A target without a score is no target to a rule: all rules choose among the same candidates. What
the loss of an optimizer step is divided by, over all of its micro-batches and ranks, depends on
labels and scores alone for every rule but Intersection and Union, so it is known before the first
forward pass, and one division by it is exact however the step is split.

A column `token_weight` multiplies what the rule gives each token: hard rules selected * weight,
soft ones weight * weight. The rule ranks losses as without it, and the divisor stays a number of
tokens, so that weights of 2 everywhere are twice the gradient. A token of weight 0 is read and is
no target: no candidate, and in no mean that is logged. A negative one, NaN or infinity under a
candidate is refused. `loss_all` counts every target once, whatever its weight; so does evaluation.

Letters: B rows, T positions, D width, V vocabulary.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm.model.selected import Selected
from slm.selection import Selection
from slm.selection.books import TokenRecord
from slm.selection.registry import RULES, make_rule
from slm.store.columns import COLUMNS, LOGPROBS
from slm.store.windows import IGNORE_INDEX, WEIGHT, Batch
from slm_kernels import (
    WeightedCrossEntropy,
    weighted_cross_entropy,
    weighted_cross_entropy_from_logits,
)
from slm_kernels.ops import refuse

Columns = Mapping[str, Tensor]  # of a batch by their keys; other names are looked over
COLUMN = LOGPROBS.key
SCORES = tuple(column.key for column in COLUMNS.values())
BESIDE = (*SCORES, WEIGHT)  # what may stand beside a token
LOGGED = ("loss_all", "loss_selected", "loss_unselected", "kept_frac", "scored_frac")  # of means


class SelectiveOutput(NamedTuple):
    """Only `loss` carries gradient; all but it and divisor are about the next token."""

    loss: Tensor  # ()
    token_loss: Tensor  # (B, T), nats
    selected: Tensor  # (B, T), bool
    token_weight: Tensor  # (B, T)
    divisor: Tensor  # (), what this micro-batch adds to the step's denominator


class SelectiveLoss:
    """Cross-entropy of the tokens that a rule chooses (Rho-1, arXiv 2404.07965, Eq 3-5).

        SelectiveLoss(0.6)                               # the highest excess loss
        SelectiveLoss(0.6, "sequence", "random")         # as many of the same candidates
        SelectiveLoss(selection=Sigmoid(temperature=1.0))

    select_ratio:  the paper's k, in (0, 1]
    scope:         among which tokens they are ranked: "sequence" (each row), "batch" (one forward
                   on one rank, the default) or "global" (one forward on all ranks). Only "sequence"
                   chooses the same tokens however a step is split into micro-batches and ranks
    selection:     the word of a rule that these two describe; else a rule of slm.selection, or how
                   a folder writes one, {"rule": "sigmoid", "temperature": 1.0}, without these two
    """

    def __init__(
        self,
        select_ratio: Any = None,
        scope: str | None = None,
        selection: Selection | Mapping[str, Any] | str = "excess",
    ):
        self.rule = rule_of(select_ratio, scope, selection)
        if self.rule.replaces:
            raise ValueError(
                f"{self.rule} replaces inputs before the forward pass, and a loss comes after it: "
                "mode='mask' is for doors, `slm train` has both"
            )

    def check_step(self, framework: str, knows_tokens: bool = False, divides: str = "") -> None:
        """Refuse a rule that this framework cannot serve.

        knows_tokens:  it can say how many tokens were seen, and so follow a schedule
        divides:       what divides its loss, before the rule has chosen; empty: after that
        """
        moving = [one for one in self.rule.schedules if len(one.points) > 1]
        if moving and not knows_tokens:
            raise ValueError(
                f"selection {self.rule} follows the tokens seen, which {framework} does not count "
                "for it: give a number as its ratio"
            )
        if divides:
            try:
                self.rule.divisor(torch.ones((), dtype=torch.int64), 0)
            except ValueError as error:
                raise ValueError(f"{error}, and {divides}: {framework} cannot use it") from None

    def __call__(
        self,
        hidden: Tensor,  # (B, T, D)
        head: Mapping[str, Any],  # weight, and bias, logit_scale, softcap by need
        targets: Tensor,  # (B, T), shifted
        columns: Columns,  # (B, T) each, shifted: scores, NaN: none; token_weight, NaN: no target
        denominator: Tensor | float,
        tokens_seen: int = 0,
        rows: Selected | None = None,
    ) -> SelectiveOutput:
        """Weighted sum of the targets' losses / denominator.

        rows: what `selected_backward` gave around the forward pass of `hidden`
        """
        on_cpu = targets.device.type == "cpu"  # where counting rows is free
        max_rows = None if on_cpu else self.rule.max_rows({"targets": targets}, tokens_seen)
        loss = partial(weighted_cross_entropy, hidden, max_rows=max_rows, **head)
        output = self.through(loss, targets, columns, denominator, tokens_seen)
        if rows is not None:
            rows.select(output.token_weight, max_rows)
        return output

    def of_logits(
        self,
        logits: Tensor,  # (B, T, V)
        targets: Tensor,
        columns: Columns,
        denominator: Tensor | float,
        tokens_seen: int = 0,
    ) -> SelectiveOutput:
        """The same where logits are all that there is."""
        loss = partial(weighted_cross_entropy_from_logits, logits)
        return self.through(loss, targets, columns, denominator, tokens_seen)

    def through(
        self,
        loss: Callable[..., WeightedCrossEntropy],
        targets: Tensor,
        columns: Columns,
        denominator: Tensor | float,
        tokens_seen: int,
    ) -> SelectiveOutput:
        """The same by `loss(targets=, token_weight=, denominator=)`, as slm_kernels has it."""
        batch = self.batch(targets, columns)
        weight, made = self.rule.deferred(batch, tokens_seen)
        if self.rule.needs_entropy:
            loss = partial(loss, want_entropy=True)
        out = loss(targets=targets, token_weight=weight, denominator=denominator)
        (choice,) = made
        by_choice = self.rule.divides_by == "selected"
        counted = choice.selected if by_choice else batch["targets"] != IGNORE_INDEX
        return SelectiveOutput(
            out.loss, out.token_loss, choice.selected, out.token_weight, counted.sum()
        )

    def batch(self, targets: Tensor, columns: Columns) -> Batch:
        """What the rule sees, with numbers of windows by need.

        Where a framework has none they are drawn from torch's own generator, whose state trainers
        save and restore.
        """
        batch = self.candidates(targets, columns)
        if self.rule.reads_window and "window" in columns:
            return batch | {name: columns[name] for name in ("window", "epoch")}
        if self.rule.reads_window:
            rows = targets.new_zeros(len(targets))
            return batch | {"window": rows.clone().random_(2**62), "epoch": rows}
        return batch

    def candidates(self, targets: Tensor, columns: Columns) -> Batch:
        """The targets that have every score and no weight of 0; others are none to a rule."""
        names = [name for name in SCORES if name in (COLUMN, *self.rule.needs)]
        if missing := [name for name in self.rule.needs if name not in columns]:
            raise ValueError(
                f"{type(self.rule).__name__} needs {missing[0]}, the batch has "
                f"{', '.join(sorted(columns)) or 'no scores'}"
            )
        batch = {"targets": targets}
        for name in names:
            if name in columns:
                batch[name] = checked(name, columns[name].float(), targets)
                unscored = batch[name].isnan()
                batch["targets"] = batch["targets"].masked_fill(unscored, IGNORE_INDEX)
        if WEIGHT in columns:
            batch[WEIGHT] = checked_weight(columns[WEIGHT].float(), batch["targets"])
            batch["targets"] = batch["targets"].masked_fill(batch[WEIGHT] == 0, IGNORE_INDEX)
        return batch

    def denominator(
        self,
        micro_batches: Sequence[tuple[Tensor, Columns]],  # targets and scores, shifted
        sum_over_ranks: Callable[[Tensor], Tensor],
        tokens_seen: int = 0,
    ) -> Tensor:  # ()
        """What the loss of all these micro-batches on all ranks is divided by."""
        counts = [self._count(*one) for one in micro_batches]
        if self.rule.scope == "global":  # a micro-batch's tokens are ranked with other ranks'
            counts = [sum_over_ranks(torch.stack(counts))]
        total = torch.stack([self.rule.divisor(one, tokens_seen).sum() for one in counts]).sum()
        return total if self.rule.scope == "global" else sum_over_ranks(total)

    def _count(self, targets: Tensor, columns: Columns) -> Tensor:  # () or (B,)
        live = self.candidates(targets, columns)["targets"] != IGNORE_INDEX
        return live.sum(-1) if self.rule.scope == "sequence" else live.sum()


def rule_of(
    select_ratio: Any, scope: str | None, selection: Selection | Mapping[str, Any] | str
) -> Selection:
    """The rule that a door was given."""
    if isinstance(selection, str):
        return make_rule({"rule": selection} | fields_for(selection, select_ratio, scope))
    for name, value in (("select_ratio", select_ratio), ("scope", scope)):
        if value is not None:
            raise ValueError(f"{name} is {value!r}, but {selection} says it itself: leave one out")
    return selection if isinstance(selection, Selection) else make_rule(selection)


def fields_for(word: str, select_ratio: Any, scope: str | None) -> dict[str, Any]:
    """What a rule that is named by its word alone gets: what it takes, and no more."""
    if word not in RULES:
        return {}
    takes = inspect.signature(RULES[word]).parameters
    for name, value in (("select_ratio", select_ratio), ("scope", scope)):
        if value is not None and name not in takes:
            raise ValueError(f"{name} is {value!r}, but {word} has none: leave it out")
    given = {"select_ratio": select_ratio, "scope": scope or "batch", "seed": 0}
    return {name: value for name, value in given.items() if name in takes}


def record_of(output: SelectiveOutput, targets: Tensor, columns: Columns) -> TokenRecord:
    """Of a micro-batch, for its books; a door has no numbers of windows, so rows are counted."""
    valid = targets != IGNORE_INDEX
    return TokenRecord(
        window=torch.arange(len(targets)),
        valid=valid & (columns[WEIGHT] != 0) if WEIGHT in columns else valid,
        selected=output.selected,
        token_loss=output.token_loss.detach(),
        reference_loss=-columns[COLUMN] if COLUMN in columns else None,
        token_weight=output.token_weight,
    )


def check_shape(name: str, values: Tensor, targets: Tensor) -> None:
    if targets.shape != values.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, the labels have {tuple(targets.shape)}"
        )


def checked(name: str, values: Tensor, targets: Tensor) -> Tensor:
    """ValueError where a target's score is none; an assertion on the device, where there is one."""
    check_shape(name, values, targets)
    (column,) = [one for one in COLUMNS.values() if one.key == name]
    wrong = (targets != IGNORE_INDEX) & ((column.sign * values < 0) | values.isinf())
    return refuse(values, wrong, values, f"{name}: {column.needed}, or NaN for no score")


def checked_weight(values: Tensor, targets: Tensor) -> Tensor:
    """ValueError where a candidate's weight is none; an assertion where it is on a device."""
    check_shape(WEIGHT, values, targets)
    wrong = (targets != IGNORE_INDEX) & ~((values >= 0) & (values < torch.inf))
    return refuse(values, wrong, values, f"{WEIGHT}: a finite number >= 0 is needed")


def shifted(labels: Tensor, columns: Columns) -> tuple[Tensor, dict[str, Tensor]]:
    """What the position before each token predicts; the last position predicts nothing."""
    found = {name: columns[name] for name in BESIDE if name in columns}
    for name, values in found.items():
        check_shape(name, values, labels)
    return moved(labels, IGNORE_INDEX), {
        name: moved(values, torch.nan) for name, values in found.items()
    }


def moved(values: Tensor, last: float) -> Tensor:  # (B, T)
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], dim=1)
