"""SelectiveModule's loss in a LightningModule of your own (made for lightning 2.6).

    class Mine(SelectiveMixin, LightningModule):
        selective = SelectiveLoss(select_ratio=0.6)  # or SelectiveLoss(selection=Sigmoid(1.0))

        def training_step(self, batch, batch_idx):
            hidden = self.model.model(batch["input_ids"]).last_hidden_state
            head = {"weight": self.model.lm_head.weight}
            return self.selective_loss(hidden, head, batch["targets"], batch["reference_logprob"])

Lightning averages the losses of accumulated micro-batches and the gradients of ranks; the selective
loss is a sum over all of them, divided once by the number of tokens selected. So each micro-batch
leaves the gradient of its sum, and `on_before_optimizer_step` divides, before gradients are
clipped. It divides all gradients, so another term cannot be added to the loss: that is refused. The
value that `selective_loss` returns is the mean over the micro-batch's selected tokens; that of the
whole step is logged as train/loss. A step may return None, and nothing of it counts. `targets` and
`reference_logprob` are shifted, as batches of Windows are; what else a rule needs goes beside them,
as `reference_entropy=batch["reference_entropy"]`, so do weights, `token_weight=`, and `window=` and
`epoch=` make Random draw what the trainer draws. For validation take
slm_kernels.token_cross_entropy over every target.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from slm.integrations.loss import COLUMN, SelectiveLoss, record_of
from slm.integrations.signatures import check_parameters
from slm.model.selected import Selected
from slm.selection.books import means, named, no_sums, step_sums

MADE_FOR = "lightning 2.6"
check_parameters(LightningModule.on_before_optimizer_step, ("optimizer",), MADE_FOR)
# Denominator until the step's is known: keeps 16-bit gradients in range, and is that of every rank.
PROVISIONAL = 1024.0


class SelectiveMixin:
    """Before LightningModule among the bases; `selective` says how tokens are chosen.

    Logs train/loss (the one that is minimised), train/loss_all (over every target, comparable
    across select ratios) and slm/kept_frac, each of the whole optimizer step.
    """

    selective: SelectiveLoss
    _open_step: int | None = None  # whose gradients are not divided yet
    # What was returned, and its sums with the divisor as their last, until backward.
    _pending: tuple[Tensor, Tensor] | None = None

    def selective_loss(
        self,
        hidden: Tensor,  # (B, T, D)
        head: Mapping[str, Any],  # weight, and bias, logit_scale, softcap by need
        targets: Tensor,  # (B, T), -100: no target
        reference_logprob: Tensor | None = None,  # (B, T), nats, NaN: no score
        rows: Selected | None = None,  # of `selected_backward` around the forward pass
        **columns: Tensor,
    ) -> Tensor:  # ()
        """What training_step returns: the mean of this micro-batch, with the gradient of its sum.

        The gradient is that of the step's mean once the step is divided.
        """
        me: Any = self
        if not me.automatic_optimization:
            raise ValueError("automatic_optimization is False: nobody would divide the gradients")
        if not me.trainer.training:
            raise ValueError(
                "selective_loss is for training_step; evaluate every target with "
                "slm_kernels.token_cross_entropy"
            )
        self.selective.check_step("SelectiveMixin")
        self._pending = None  # of a step that returned None, whose graph goes before the next
        if reference_logprob is not None:
            columns[COLUMN] = reference_logprob
        output = self.selective(hidden, head, targets, columns, PROVISIONAL, rows=rows)
        mean = output.loss.detach() * PROVISIONAL / output.divisor.clamp(min=1)
        scaled = output.loss * me.trainer.accumulate_grad_batches
        returned = scaled - scaled.detach() + mean
        sums = step_sums(record_of(output, targets, columns))
        self._pending = returned, torch.cat([sums, output.divisor.to(sums)[None]])
        return returned

    def _begin(self, step: int, device: torch.device) -> None:
        if self._open_step == step:
            return
        if self._open_step is not None:
            raise RuntimeError(
                f"the gradients of step {self._open_step} were not divided: does "
                f"{type(self).__name__}.on_before_optimizer_step call super()?"
            )
        self._open_step, self._sums = step, F.pad(no_sums(device), (0, 1))

    def on_fit_start(self) -> None:
        """A step that an earlier fit left unfinished has no gradients any more."""
        me: Any = super()
        me.on_fit_start()
        self._open_step = None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning calls it for a micro-batch that leaves gradients, so this one counts."""
        me: Any = super()
        if self._pending is None or not is_alone(loss, self._pending[0]):
            raise ValueError(
                "training_step did not return what selective_loss gave it: the step is divided by "
                "the number of selected tokens, and another term would be with it"
            )
        _, sums = self._pending
        self._pending = None
        self._begin(me.trainer.global_step, sums.device)
        self._sums += sums
        me.backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Divide the gradients by the tokens selected in all micro-batches on all ranks."""
        me: Any = super()
        me.on_before_optimizer_step(optimizer)
        if self._open_step is None:  # every training_step of it returned None
            return
        module: Any = self
        sums = torch.as_tensor(module.trainer.strategy.reduce(self._sums, reduce_op="sum"))
        *values, divisor = sums.tolist()
        found = named(values)
        valid = found["num_valid"]
        if valid and not divisor:
            raise ValueError(f"all of the step's {valid:.0f} targets have NaN as their score")
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        factor = PROVISIONAL * module.trainer.world_size / max(1.0, divisor)
        if gradients:
            torch._foreach_mul_(gradients, factor)  # type: ignore[attr-defined]  # as in clipping
        self._open_step = None
        if not valid:
            return
        mean = means(found)
        loss = found["loss_weighted"] / divisor
        logged = {"train/loss": loss, "train/loss_all": mean["loss_all"]}
        module.log_dict(logged | {"slm/kept_frac": mean["kept_frac"]}, rank_zero_only=True)


def is_alone(loss: Tensor, returned: Tensor) -> bool:
    """Whether `loss` is nothing but what selective_loss returned, scaled by Lightning."""
    node = loss.grad_fn
    while node is not None and node is not returned.grad_fn:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if len(parents) == 1 else None
    return node is returned.grad_fn
