"""The selective loss as the adapters call it: unshifted labels, one denominator for a whole step.

`labels` and `reference_logprob` stand beside the tokens that they are about, as Hugging Face has
it: entry i is about token i. `shifted` moves both to the position that predicts.

The denominator of an optimizer step is the number of tokens selected in all of its micro-batches on
all ranks, as in slm/train/module.py. How many that are depends on labels and scores alone, so it is
known before the first forward pass, and one division by it is exact however the step is split.

Letters: B rows, T positions, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from slm.selection.books import TokenRecord
from slm.store.columns import LOGPROBS
from slm.store.windows import IGNORE_INDEX
from slm_kernels import (
    select_count,
    select_top_k,
    selective_cross_entropy,
    weighted_cross_entropy,
)
from slm_kernels.selection import SCOPES, check_select_ratio

COLUMN = LOGPROBS.key
LOGGED = ("loss_all", "loss_selected", "loss_unselected", "kept_frac", "scored_frac")  # of means
SELECTIONS = ("excess", "random")


class SelectiveOutput(NamedTuple):
    """Only `loss` carries gradient; token_loss and selected are about the next token."""

    loss: Tensor  # ()
    token_loss: Tensor  # (B, T), nats
    selected: Tensor  # (B, T), bool


@dataclass(frozen=True)
class SelectiveLoss:
    """Cross-entropy of the tokens with the highest excess loss (Rho-1, arXiv 2404.07965, Eq 3-5).

    select_ratio:  the paper's k, in (0, 1]
    scope:         among which tokens they are ranked: "sequence" (each row), "batch" (one forward
                   on one rank) or "global" (one forward on all ranks). Only "sequence" chooses the
                   same tokens however a step is split into micro-batches and ranks
    selection:     "excess", or "random": as many of the same candidates, the control
    """

    select_ratio: float
    scope: str = "batch"
    selection: str = "excess"

    def __post_init__(self) -> None:
        if isinstance(self.select_ratio, bool) or not isinstance(self.select_ratio, int | float):
            raise ValueError(f"select_ratio is {self.select_ratio!r}, it must be a number")
        check_select_ratio(self.select_ratio)
        for name, known in (("scope", SCOPES), ("selection", SELECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, it must be one of {known}")

    def __call__(
        self,
        hidden: Tensor,  # (B, T, D)
        head: Mapping[str, Any],  # weight, and bias, logit_scale, softcap by need
        targets: Tensor,  # (B, T), shifted
        reference_logprob: Tensor,  # (B, T), shifted; nats, NaN: no score
        denominator: Tensor | float,
    ) -> SelectiveOutput:
        """Sum of the selected tokens' losses / denominator."""
        check_shapes(targets, reference_logprob)
        if self.selection == "random":
            return self._random(hidden, head, targets, reference_logprob, denominator)
        ranking = {"scope": self._scope, "group": self._group}
        out = selective_cross_entropy(
            hidden,
            targets=targets,
            reference_loss=-reference_logprob.float(),
            select_ratio=self.select_ratio,
            denominator=denominator,
            **ranking,
            **head,
        )
        return SelectiveOutput(out.loss, out.token_loss, out.selected)

    def _random(
        self,
        hidden: Tensor,
        head: Mapping[str, Any],
        targets: Tensor,
        reference_logprob: Tensor,
        denominator: Tensor | float,
    ) -> SelectiveOutput:
        """Drawn from torch's own generator, whose state the trainers save and restore."""
        selected = select_top_k(
            torch.rand(targets.shape, device=targets.device),
            is_candidate(targets, reference_logprob),
            self.select_ratio,
            scope=self._scope,
            group=self._group,
        )
        out = weighted_cross_entropy(
            hidden, targets=targets, token_weight=selected, denominator=denominator, **head
        )
        return SelectiveOutput(out.loss, out.token_loss, selected)

    @property
    def _group(self) -> Any:
        return dist.group.WORLD if self.scope == "global" and dist.is_initialized() else None

    @property
    def _scope(self) -> str:
        """A single process is a group of one."""
        return "batch" if self.scope == "global" and self._group is None else self.scope

    def num_selected(
        self,
        micro_batches: Sequence[tuple[Tensor, Tensor]],  # targets and reference_logprob, shifted
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> Tensor:  # ()
        """How many tokens all these micro-batches select on all ranks: the step's denominator."""
        counts = [self._count(*one) for one in micro_batches]
        if self.scope == "global":  # a micro-batch's tokens are ranked with those of other ranks
            candidates = sum_over_ranks(torch.stack(counts))
            return select_count(candidates, self.select_ratio).sum()
        return sum_over_ranks(
            torch.stack([select_count(count, self.select_ratio).sum() for count in counts]).sum()
        )

    def _count(self, targets: Tensor, reference_logprob: Tensor) -> Tensor:  # () or (B,)
        check_shapes(targets, reference_logprob)
        check_signs(reference_logprob)
        candidates = is_candidate(targets, reference_logprob)
        return candidates.sum(-1) if self.scope == "sequence" else candidates.sum()


def record_of(output: SelectiveOutput, targets: Tensor, reference_logprob: Tensor) -> TokenRecord:
    """Of a micro-batch, for its books; a door has no numbers of windows, so rows are counted."""
    return TokenRecord(
        window=torch.arange(len(targets)),
        valid=targets != IGNORE_INDEX,
        selected=output.selected,
        token_loss=output.token_loss.detach(),
        reference_loss=-reference_logprob,
        token_weight=output.selected,
    )


def is_candidate(targets: Tensor, reference_logprob: Tensor) -> Tensor:  # (B, T), bool
    return (targets != IGNORE_INDEX) & ~reference_logprob.isnan()


def check_shapes(targets: Tensor, reference_logprob: Tensor) -> None:
    if targets.shape != reference_logprob.shape:
        raise ValueError(
            f"{COLUMN} has shape {tuple(reference_logprob.shape)}, the labels have "
            f"{tuple(targets.shape)}"
        )


def check_signs(reference_logprob: Tensor) -> None:
    """Where it costs nothing; elsewhere the loss has an assertion on the device."""
    if reference_logprob.device.type != "cpu":
        return
    wrong = reference_logprob[(reference_logprob > 0) | reference_logprob.isneginf()]
    if len(wrong):
        raise ValueError(
            f"{COLUMN} holds {wrong[0].item()}, it must be a natural log of a probability: finite "
            "and <= 0, or NaN where there is no score"
        )


def shifted(
    labels: Tensor,  # (B, T)
    reference_logprob: Tensor,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """What the position before each token predicts; the last position predicts nothing."""
    check_shapes(labels, reference_logprob)
    pad = labels.new_full((len(labels), 1), IGNORE_INDEX)
    nothing = torch.full_like(pad, torch.nan, dtype=reference_logprob.dtype)
    return (
        torch.cat([labels[:, 1:], pad], dim=1),
        torch.cat([reference_logprob[:, 1:], nothing], dim=1),
    )
