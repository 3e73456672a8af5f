"""SelectiveModule's loss in a LightningModule of your own (made for lightning 2.6).

    class Mine(SelectiveMixin, LightningModule):
        selective = SelectiveLoss(select_ratio=0.6)

        def training_step(self, batch, batch_idx):
            hidden = self.model.model(batch["input_ids"]).last_hidden_state
            head = {"weight": self.model.lm_head.weight}
            return self.selective_loss(hidden, head, batch["targets"], batch["reference_logprob"])

Lightning averages the losses of accumulated micro-batches and the gradients of ranks; the selective
loss is a sum over all of them, divided once by the number of tokens selected. So each micro-batch
leaves the gradient of its sum, and `on_before_optimizer_step` divides, before gradients are
clipped. `targets` and `reference_logprob` are shifted, as batches of slm.data are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from slm.integrations.loss import COLUMN, IGNORE_INDEX, SelectiveLoss, SelectiveOutput
from slm.integrations.signatures import check_parameters

MADE_FOR = "lightning 2.6"
check_parameters(LightningModule.on_before_optimizer_step, ("optimizer",), MADE_FOR)
# Denominator until the step's is known: keeps 16-bit gradients in range, and is that of every rank.
PROVISIONAL = 1024.0
SUMS = ("loss_selected", "loss_all", "num_selected", "num_valid")


class SelectiveMixin:
    """Before LightningModule among the bases; `selective` says how tokens are chosen.

    Logs train/loss (mean over the selected tokens), train/loss_all (over every target, comparable
    across select ratios) and slm/kept_frac, each of the whole optimizer step.
    """

    selective: SelectiveLoss
    _open_step: int | None = None  # whose gradients are not divided yet

    def selective_loss(
        self,
        hidden: Tensor,  # (B, T, D)
        head: Mapping[str, Any],  # weight, and bias, logit_scale, softcap by need
        targets: Tensor,  # (B, T), -100: no target
        reference_logprob: Tensor,  # (B, T), nats, NaN: no score
    ) -> Tensor:  # ()
        """What training_step returns: of the right gradient once the step is divided."""
        me: Any = self
        if not me.automatic_optimization:
            raise ValueError("automatic_optimization is False: nobody would divide the gradients")
        self._begin(me.trainer.global_step, targets.device)
        output = self.selective(hidden, head, targets, reference_logprob, PROVISIONAL)
        self._sums += step_sums(output, targets)
        return output.loss * me.trainer.accumulate_grad_batches

    def _begin(self, step: int, device: torch.device) -> None:
        if self._open_step == step:
            return
        if self._open_step is not None:
            raise RuntimeError(
                f"the gradients of step {self._open_step} were not divided: does "
                f"{type(self).__name__}.on_before_optimizer_step call super()?"
            )
        self._open_step, self._sums = step, torch.zeros(len(SUMS), device=device)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Divide the gradients by the tokens selected in all micro-batches on all ranks."""
        me: Any = super()
        me.on_before_optimizer_step(optimizer)
        module: Any = self
        sums = torch.as_tensor(module.trainer.strategy.reduce(self._sums, reduce_op="sum"))
        selected, everything, kept, valid = sums.tolist()
        if valid and not kept:
            raise ValueError(f"all of the step's {valid:.0f} targets have NaN as their {COLUMN}")
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        factor = PROVISIONAL * module.trainer.world_size / max(1.0, kept)
        torch._foreach_mul_(gradients, factor)  # type: ignore[attr-defined]  # as torch's clipping
        self._open_step = None
        means = {
            "train/loss": selected / max(1.0, kept),
            "train/loss_all": everything / max(1.0, valid),
            "slm/kept_frac": kept / max(1.0, valid),
        }
        module.log_dict(means, rank_zero_only=True)


def step_sums(output: SelectiveOutput, targets: Tensor) -> Tensor:  # (len(SUMS),)
    terms = (
        output.token_loss.masked_fill(~output.selected, 0.0).sum(),
        output.token_loss.sum(),
        output.selected.sum(),
        (targets != IGNORE_INDEX).sum(),
    )
    return torch.stack([term.detach().float() for term in terms])
