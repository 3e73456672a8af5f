"""The Lightning module: choose tokens, compute the weighted loss, keep the step's sums.

It trains the reference model and the CLM control (selection=all) as well as the target model. One
optimizer step is `accumulate_grad_batches` micro-batches on each rank. Each leaves the gradient of
its summed loss; before the update the whole gradient is divided once, by what the rule divides by
(the number of selected or of valid tokens) over all micro-batches and ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from slm.errors import NonFiniteError, UserError, said_once
from slm.model.build import SelectiveLM
from slm.model.predict import predicted
from slm.model.sharded import is_cut, local
from slm.selection.books import StepResult, TokenRecord, mean_threshold, named, no_sums, step_sums
from slm.selection.rule import Choice, Selection
from slm.selection.rules import All
from slm.store.columns import columns_needed
from slm.store.windows import IGNORE_INDEX, Batch
from slm.train.sharded import Sharded, data_ranks

SAVED = {"tokens_selected", "tokens_trained", "empty_steps", "heldout_losses"}


class SelectiveModule(LightningModule):
    """`lm` trained on the tokens that `selection` chooses.

    tokens_per_step:   training tokens of one optimizer step, over all ranks
    selection_start:   tokens seen before `selection` takes over; until then every token is trained
    online_reference:  a frozen model that scores every batch as it comes
    fillers:           give `lm`, and the online reference, their weights when they are cut into
                       shards (sharded.py); without, they have them already
    added_id:          the token that a rule puts in the place of others
    """

    def __init__(
        self,
        lm: SelectiveLM,
        selection: Selection,
        optimizer: Callable[[SelectiveLM], Optimizer],
        schedule: Callable[[Optimizer, int], LRScheduler],
        gradient_clip: float | None,
        tokens_per_step: int,
        selection_start: int = 0,
        online_reference: SelectiveLM | None = None,
        fillers: Sequence[Callable[[SelectiveLM], None]] = (),
        added_id: int = IGNORE_INDEX,
    ):
        super().__init__()
        self.lm, self.selection = lm, selection
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.gradient_clip, self.fillers, self.added_id = gradient_clip, fillers, added_id
        self.tokens_per_step, self.selection_start = tokens_per_step, selection_start
        # In a tuple: a submodule would be wrapped, sharded and saved with what is trained.
        self.online = () if online_reference is None else (online_reference,)
        self.tokens_selected = self.tokens_trained = 0  # over the whole run and all ranks
        self.empty_steps = 0  # in which nothing passed the rule's bound
        self.grad_norm = 0.0
        self.heldout_losses: dict[str, float] = {}  # of the step that just ended, if evaluated

    @property
    def tokens_seen(self) -> int:
        """When the step began: a function of the step alone, so a resumed run agrees."""
        return self.trainer.global_step * self.tokens_per_step

    def rule(self) -> Selection:
        """The one in force at this step."""
        return self.selection if self.tokens_seen >= self.selection_start else All()

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded):
            for lm, fill in zip((self.lm, *self.online), self.fillers, strict=True):
                strategy.shard(lm, str(self.trainer.precision))
                fill(lm)

    def on_fit_start(self) -> None:
        for reference in self.online:
            reference.eval().requires_grad_(False)
            if not is_cut(reference):
                reference.to(self.device)

    def on_train_start(self) -> None:
        """The rate of the step to come: a checkpoint of a shorter run (extend.py) has another."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(schedule := config.scheduler, LambdaLR):
                for group, rate, factor in zip(
                    schedule.optimizer.param_groups,
                    schedule.base_lrs,
                    schedule.lr_lambdas,
                    strict=True,
                ):
                    group["lr"] = rate * factor(schedule.last_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._begin_step()
        batch = self.scored(batch)
        rule = self.rule()
        self._select_ratio = rule.ratio(self.tokens_seen)
        token_weight, made = rule.deferred(batch, self.tokens_seen)
        on_cpu = self.device.type == "cpu"  # where counting rows is free
        self._provisional = float(batch["targets"].numel())
        output = self.lm(
            rule.read(batch, made[0], self.added_id) if rule.replaces else batch,
            token_weight,
            denominator=self._provisional,
            max_rows=None if on_cpu else rule.max_rows(batch, self.tokens_seen),
            want_entropy=rule.needs_entropy,
            takes_all=rule.takes_all(self.tokens_seen),
        )
        self._add(batch, output, made[-1])
        # Lightning divides by the number of micro-batches; the denominator is the whole step's.
        return output.loss * self.trainer.accumulate_grad_batches

    def scored(self, batch: Batch) -> Batch:
        """With the scores of the online reference, where there is one.

        It runs under the trainer's precision, as the model that is trained does; in float32 its
        scores are the stored ones within 1e-5 nats, in bfloat16 they differ by that rounding.
        """
        for reference in self.online:
            columns = columns_needed(self.selection.needs)
            batch = batch | predicted(reference, batch, columns)
        return batch

    def _begin_step(self) -> None:
        self._sums = no_sums(self.device)
        self._records: list[TokenRecord] = []

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """In place."""
        group = data_ranks(self.trainer).group
        return torch.as_tensor(self.trainer.strategy.reduce(values, group, reduce_op="sum"))

    @torch.no_grad()
    def _add(self, batch: Batch, output: Any, choice: Choice) -> None:
        valid = batch["targets"] != IGNORE_INDEX
        reference = -batch["reference_logprob"] if "reference_logprob" in batch else None
        record = TokenRecord(
            batch["window"],
            valid,
            choice.selected,
            output.token_loss.detach(),
            reference,
            output.token_weight,
        )
        self._sums += step_sums(record)
        self._records.append(record)
        self._threshold = choice.threshold

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Divide by the denominator, clip; stop before the update where something is not finite.

        All ranks see the same numbers, so all of them stop. The one device synchronisation.
        """
        if gradient_clip_val is not None:
            raise UserError(
                f"trainer.gradient_clip_val is {gradient_clip_val}, optimizer.gradient_clip is "
                f"{self.gradient_clip}: leave the former null"
            )
        gradients = [p.grad for p in self.lm.parameters() if p.grad is not None]
        norm, totals = norm_of(gradients), self._sum_over_ranks(self._sums)
        *values, norm_value = torch.cat([totals, norm.to(totals)[None]]).tolist()
        self._totals = named(values)
        self._divided_by = max(1.0, self._totals[f"num_{self.rule().divides_by}"])
        # Data-parallel wrappers average over the ranks what is to be summed.
        scale = self._provisional * data_ranks(self.trainer).count / self._divided_by
        self.grad_norm = norm_value * scale
        self._check_finite()
        limit = math.inf if self.gradient_clip is None else self.gradient_clip
        factor = scale * min(1.0, limit / (self.grad_norm + 1e-6))
        scale_gradients(gradients, factor)
        self.tokens_selected += round(self._totals["num_selected"])
        self.tokens_trained += round(self._totals["num_trained"])
        self.empty_steps += self._totals["num_trained"] == 0

    def _check_finite(self) -> None:
        """Every target's loss, not only the selected ones': a broken model is not passed over."""
        loss = self._totals["loss_valid"]
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            windows = torch.cat([record.window for record in self._records]).tolist()
            raise NonFiniteError(
                f"step {self.trainer.global_step}: loss sum {loss}, gradient norm "
                f"{self.grad_norm}; stopped before the update (windows of this rank: {windows}); "
                "the checkpoints hold the state before it"
            )

    def step_result(self) -> StepResult:
        """Of the step that just ended. One device synchronisation, no communication."""
        threshold = mean_threshold(self._threshold)
        return StepResult(
            self._totals,
            self._divided_by,
            self._select_ratio,
            threshold,
            self.grad_norm,
            self._records,
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.lm)
        # max_steps, not estimated_stepping_batches: touching that loses dataloader state on resume.
        schedule = self.make_schedule(optimizer, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in SAVED:
            checkpoint[name] = getattr(self, name)
        checkpoint["about"] = self._about()

    def _about(self) -> dict[str, Any]:
        """What a reader needs who has this checkpoint alone."""
        corpus = self.trainer.datamodule.corpus  # type: ignore[attr-defined]
        return {
            "tokens_seen": self.tokens_seen,
            "tokenizer_sha256": corpus.manifest["tokenizer_sha256"],
            "config": self.lm.model.config.to_json_string(),
            # No part of a config's JSON, and the losses' last bits depend on it.
            "attn_implementation": self.lm.model.config._attn_implementation,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with said_once(self.trainer.global_rank):
            check_same_model(self.state_dict(), checkpoint["state_dict"])
        count_batches(checkpoint, self.trainer.accumulate_grad_batches)
        for name in SAVED & checkpoint.keys():  # earlier builds counted no empty steps
            setattr(self, name, checkpoint[name])


def check_same_model(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    shapes, theirs = ({k: tuple(v.shape) for k, v in part.items()} for part in (mine, saved))
    for name in [*shapes, *theirs]:
        found = [part[name] if name in part else "not there" for part in (theirs, shapes)]
        if found[0] != found[1]:
            raise UserError(
                f"the checkpoint is of another model: the shape of {name} is {found[0]} in it, "
                f"{found[1]} in this run"
            )


def count_batches(checkpoint: dict[str, Any], per_step: int) -> None:
    """In place: Lightning counts a rank's batches, of which another number of ranks makes more or
    fewer a step. Those of the steps so far, as checkpoints are made at a step's end."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    more = checkpoint["global_step"] * per_step - progress["total"]["ready"]
    for counts in (progress["current"], progress["total"]):
        counts |= {name: count + more for name, count in counts.items()}


def norm_of(gradients: list[Tensor]) -> Tensor:  # ()
    """Of whole tensors, those that are in shards too."""
    norms = [
        norm_over(mesh, get_total_norm([local(gradient) for gradient in alike]))
        for mesh, alike in by_mesh(gradients).items()
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def norm_over(mesh: DeviceMesh | None, norm: Tensor) -> Tensor:  # ()
    """Of all ranks' shards, of one's."""
    if mesh is None:
        return norm
    square = norm.square()
    for dim in range(mesh.ndim):
        distributed.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()


def scale_gradients(gradients: list[Tensor], factor: float) -> None:
    """In place, sharded ones too."""
    for alike in by_mesh(gradients).values():
        torch._foreach_mul_(alike, factor)  # type: ignore[attr-defined]  # as torch's clipping


def by_mesh(gradients: list[Tensor]) -> dict[DeviceMesh | None, list[Tensor]]:
    """torch computes with tensors of one mesh at once, and tensor parallelism leaves vectors in a
    smaller one; None: no shards."""
    found: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        found.setdefault(mesh, []).append(gradient)
    return found or {None: []}
