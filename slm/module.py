"""The Lightning module: choose candidates, compute the selective loss, keep the step's sums.

It trains the reference model and the CLM control (selection=all) as well as the target model. One
optimizer step is `accumulate_grad_batches` micro-batches on each rank; its loss is the sum over all
selected tokens divided once by their number, which is known before the first micro-batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slm.data import IGNORE_INDEX, Batch
from slm.errors import NonFiniteError, UserError
from slm.model import SelectiveLM
from slm.selection import Selection, num_selected

SUMS: tuple[str, ...] = (
    "loss_selected",  # nats, over selected tokens
    "loss_valid",  # nats, over every target
    "num_selected",
    "num_valid",
    "reference_loss",  # nats, over tokens with a reference score
    "reference_loss_selected",
    "num_scored",
)


class StepResult(NamedTuple):
    """Sums over one optimizer step, all ranks, and what the update looked like."""

    sums: dict[str, float]
    threshold: float | None  # lowest selected excess of this rank's last micro-batch, nats; with
    #                          scope=sequence the mean over its windows; None: no rule for it
    grad_norm: float


class SelectiveModule(LightningModule):
    """`lm` trained on the tokens that `selection` chooses."""

    def __init__(
        self,
        lm: SelectiveLM,
        selection: Selection,
        optimizer: Callable[[SelectiveLM], Optimizer],
        schedule: Callable[[Optimizer, int], LRScheduler],
        gradient_clip: float | None,
    ):
        super().__init__()
        if gradient_clip is not None and not gradient_clip > 0:
            raise UserError(
                f"optimizer.gradient_clip is {gradient_clip}, it must be above 0, or null for none"
            )
        self.lm, self.selection = lm, selection
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.gradient_clip = gradient_clip
        # Over the whole run and all ranks; kept on the device, since reading it would wait for it.
        self.tokens_selected = torch.zeros((), dtype=torch.float64)
        self.grad_norm = 0.0
        self.heldout_losses: dict[str, float] = {}  # of the step that just ended, if evaluated
        self._windows: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._begin_step(batch)
        criterion = self.selection.criterion(batch)
        output = self.lm(
            batch,
            criterion.reference_loss,
            select_ratio=criterion.select_ratio,
            scope=self.selection.scope,
            denominator=self._denominator,
        )
        self._add(batch, output)
        # A rule that keeps all of its candidates has no threshold among them.
        self._thresholds = output.threshold if criterion.select_ratio < 1 else None
        # Lightning divides by the number of micro-batches; the denominator already covers them.
        return output.loss * self.trainer.accumulate_grad_batches

    def _begin_step(self, batch: Batch) -> None:
        """Count, over ranks and micro-batches, the tokens that will be selected."""
        count = num_selected(self.selection, batch["step_valid"]).double()
        self._step_selected = self._sum_over_ranks(count)
        # Data-parallel wrappers average gradients, so each rank divides by total / world size.
        self._denominator = self._step_selected.clamp(min=1) / self.trainer.world_size
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self._windows = []

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """In place."""
        return torch.as_tensor(self.trainer.strategy.reduce(values, reduce_op="sum"))

    @torch.no_grad()
    def _add(self, batch: Batch, output: Any) -> None:
        valid, selected = batch["targets"] != IGNORE_INDEX, output.selected
        terms = [
            *(masked_sum(output.token_loss, mask) for mask in (selected, valid)),
            *(mask.sum().double() for mask in (selected, valid)),
        ]
        if "reference_logprob" in batch:
            reference = -batch["reference_logprob"]
            terms += [masked_sum(reference, mask) for mask in (valid, selected)]
            terms += [valid.sum().double()]
        else:
            terms += [terms[0].new_zeros(())] * 3
        self._sums += torch.stack(terms)
        self._windows.append(batch["window"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and stop before the optimizer step where a loss or the gradient is not finite.

        All ranks see the same numbers, so all of them stop. The one device synchronisation.
        """
        if gradient_clip_val is not None:
            raise UserError(
                f"trainer.gradient_clip_val is {gradient_clip_val}, optimizer.gradient_clip is "
                f"{self.gradient_clip}: leave the former null"
            )
        norm = clip(self.lm, self.gradient_clip)
        self._totals = self._sum_over_ranks(self._sums)
        # Every target's loss, not only the selected ones': a broken model is not passed over.
        loss, self.grad_norm = torch.stack([self._totals[1], norm.double()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            windows = torch.cat(self._windows).tolist()
            raise NonFiniteError(
                f"step {self.trainer.global_step}: loss sum {loss}, gradient norm "
                f"{self.grad_norm}; stopped before the update (windows of this rank: {windows}); "
                "the checkpoints hold the state before it"
            )
        self.tokens_selected = self.tokens_selected.to(self.device) + self._step_selected

    def step_result(self) -> StepResult:
        """Of the step that just ended. One device synchronisation, no communication."""
        sums = dict(zip(SUMS, self._totals.tolist(), strict=True))
        return StepResult(sums, mean_threshold(self._thresholds), self.grad_norm)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.lm)
        # max_steps, not estimated_stepping_batches: touching that loses dataloader state on resume.
        schedule = self.make_schedule(optimizer, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_selected"] = self.tokens_selected.cpu()
        checkpoint["heldout_losses"] = self.heldout_losses

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_selected = checkpoint["tokens_selected"]
        self.heldout_losses = checkpoint["heldout_losses"]


def clip(module: nn.Module, limit: float | None) -> Tensor:  # ()
    """Scale all gradients so that their norm is at most `limit`; returns the norm before."""
    limit = float("inf") if limit is None else limit
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # DTensor: sharded by FSDP


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:  # (B, T), (B, T) -> () float64
    """Sum of the values under the mask. No synchronisation, which indexing with a mask would be."""
    return values.detach().double().masked_fill(~mask, 0.0).sum()


def mean_threshold(thresholds: Tensor | None) -> float | None:  # (), or (B,) with scope=sequence
    """Mean over the windows where something was selected; infinite in the others."""
    if thresholds is None:
        return None
    finite = thresholds[thresholds.isfinite()]
    return finite.mean().item() if len(finite) else None
