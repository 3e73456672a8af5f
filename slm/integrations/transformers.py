"""Selective language modeling in Hugging Face's `Trainer` (made for transformers 5.23).

    class MyTrainer(SelectiveTrainerMixin, Trainer): ...     # or SelectiveTrainer, which is that

    trainer = SelectiveTrainer(model, args, train_dataset=dataset, select_ratio=0.6)
    trainer = SelectiveTrainer(model, args, train_dataset=dataset, selection=Sigmoid(1.0))
    trainer = SelectiveTrainer(..., select_ratio=0.6, backward="selected")  # slm/model/selected.py

`train_dataset` has a column `reference_logprob` beside `input_ids`: one log-prob (natural log) a
token, NaN where there is none; slm.integrations.datasets makes it. A rule that needs another score
column finds it there, one that needs none does without. A column `token_weight`, one number a
token, multiplies the losses of what is selected (slm/integrations/loss.py). The mixin

    keeps the columns   which `remove_unused_columns` would drop without a word
    wraps the collator  so that scores are padded with NaN exactly where its tokens went
    replaces the loss   inside the model's forward, which DDP and FSDP wrap, without any logits
    divides once        by the tokens selected in all micro-batches of the step on all ranks

Evaluation stays plain cross-entropy over every target, which is comparable across select ratios;
so is `loss_all`, logged beside `loss`. A batch without scores raises; it never falls back.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from slm.checks import check_value, word
from slm.integrations.collator import ReferenceCollator
from slm.integrations.loss import BESIDE, LOGGED, Columns, SelectiveLoss, record_of, shifted
from slm.integrations.signatures import check_attributes, check_parameters
from slm.model.head import check_causal, check_head, head_arguments, loss_terms, projection_of
from slm.model.selected import check_rows, selected_backward
from slm.selection import Selection
from slm.selection.books import means, named, no_sums, step_sums
from slm.store.windows import IGNORE_INDEX

MADE_FOR = "transformers 5.23"
check_parameters(Trainer.compute_loss, ("inputs", "return_outputs", "num_items_in_batch"), MADE_FOR)
check_parameters(Trainer.get_batch_samples, ("epoch_iterator", "num_batches", "device"), MADE_FOR)
check_parameters(Trainer.prediction_step, ("model", "inputs"), MADE_FOR)
check_parameters(Trainer.log, ("logs", "start_time"), MADE_FOR)
check_attributes(
    Trainer,
    ("_set_signature_columns_if_needed", "_inner_training_loop", "training_step"),
    MADE_FOR,
)

BACKWARD = word("exact", "selected")
PROBE_TOKENS = 8
LIGER_LOSS = "fused_linear_cross_entropy"
ADVICE = "; slm.integrations.datasets.score_dataset adds it, and nothing can be selected without"


# ---- the model ----------------------------------------------------------------------------------


def causal_lm(model: Any) -> PreTrainedModel:
    """The model of transformers inside, without PEFT's wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_causal(inner)
    return inner


def check_causal_lm(model: Any) -> None:
    """Refuse what the loss would compute wrongly without a word."""
    inner = causal_lm(model)
    projection: Any = projection_of(inner)
    if type(projection) is not nn.Linear:  # of an adapter the loss would see the base weight alone
        raise ValueError(
            f"the output layer is a {type(projection).__module__}.{type(projection).__name__}, it "
            "must be torch's Linear: leave it out of target_modules and modules_to_save"
        )
    if projection.weight.numel() == 0:
        raise ValueError("the output layer is empty: DeepSpeed ZeRO-3 is not supported")
    if getattr(model, "active_peft_config", None) and model.active_peft_config.is_prompt_learning:
        raise ValueError("prompt learning moves the tokens away from their scores; use LoRA")
    if (term := loss_terms(inner)) is not None:
        raise ValueError(f"{term}, its auxiliary loss would be left out")
    if not projection.weight.is_meta:
        probe_head(inner)


def probe_head(model: PreTrainedModel) -> None:
    training = model.training
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
    check_head(model.eval(), {"input_ids": ids, "targets": ids.roll(-1, 1)})
    model.train(training)


def probe_rows(model: PreTrainedModel) -> None:
    training = model.training
    check_rows(model.train(), {"input_ids": torch.arange(PROBE_TOKENS, device=model.device)[None]})
    model.train(training)


def attach(model: nn.Module, loss: SelectiveLoss, backward: str = "exact") -> None:
    """`model(..., labels=, reference_logprob=, denominator=)` returns a SelectiveOutput.

    Without a denominator the forward is what it was. It is called through whatever wraps the
    model, so that DDP and FSDP see one forward, and the backbone is looked up then, since FSDP and
    PEFT replace it later.
    """
    check_causal_lm(model)
    inner = causal_lm(model)
    if backward == "selected":
        probe_rows(inner)
    bound: Any = inner.forward
    original = bound.__func__  # not the bound method: a deep copy of the model must call itself

    def forward(
        self: Any,
        *args: Any,
        denominator: Tensor | float | None = None,
        tokens_seen: int = 0,
        **kwargs: Any,
    ) -> Any:
        if denominator is None:
            return original(self, *args, **kwargs)
        columns = {name: kwargs.pop(name) for name in BESIDE if name in kwargs}
        targets, scores = shifted(kwargs.pop("labels"), columns)
        cuts = backward == "selected" and not loss.rule.takes_all(tokens_seen)
        with selected_backward(self) if cuts else nullcontext() as rows:
            hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        return loss(hidden, head_arguments(self), targets, scores, denominator, tokens_seen, rows)

    # What inspects the signature must find the model's; __wrapped__ would lead accelerate past us.
    forward.__signature__ = inspect.signature(type(inner).forward)  # type: ignore[attr-defined]
    inner.forward = MethodType(forward, inner)


# ---- the trainer --------------------------------------------------------------------------------


class SelectiveTrainerMixin:
    """Before a `Trainer` among the bases. Takes what SelectiveLoss takes as keywords more.

    backward: exact, or selected: along the selected tokens alone, of any model that this computes
    """

    def __init__(
        self,
        *args: Any,
        select_ratio: Any = None,
        scope: str | None = None,
        selection: Selection | Mapping[str, Any] | str = "excess",
        backward: str = "exact",
        **kwargs: Any,
    ):
        check_value("backward", backward, BACKWARD)
        self.selective = SelectiveLoss(select_ratio, scope, selection)
        super().__init__(*args, **kwargs)
        me: Any = self
        check_trainer(me)
        if backward == "selected":
            check_plain(me.args)
        counts = me.args.include_num_input_tokens_seen != "no"
        asked = "Trainer" if counts else "Trainer without include_num_input_tokens_seen"
        self.selective.check_step(asked, counts, "its loss is divided before the first forward")
        self.check_rows(names_of(me.train_dataset))
        me.data_collator = ReferenceCollator(me.data_collator)
        if not hasattr(me, "loss_is_scaled_for_ga"):  # transformers 5.16 asks this instead
            me.model_accepts_loss_kwargs = True
        me.loss_is_scaled_for_ga = True
        attach(me.model, self.selective, backward)
        self._sums = no_sums(me.args.device)
        self._waiting: list[Any] = []  # micro-batches of a step that the end of a stream cut short

    def check_rows(self, names: list[str]) -> None:
        """Refuse columns that the trainer would drop, and with them what scores depend on."""
        if "seq_lengths" in names:
            raise ValueError(
                "the rows hold several documents (seq_lengths), which Trainer would join: use "
                "SelectiveSFTTrainer with padding_free=True, or a row for each document"
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sums.zero_()  # of another training, or of one that began with too large a batch
        self._waiting = []
        me: Any = super()
        return me._inner_training_loop(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        me: Any = super()
        me._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[attr-defined]
        columns += [name for name in BESIDE if name not in columns]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The step's micro-batches, and how many tokens they select on all ranks.

        A stream of unknown length may end within a step. Trainer would add the gradients of these
        micro-batches, divided by their own count, to the next step's: they wait for its others.
        """
        me: Any = self
        read: Any = super()
        missing = num_batches - len(self._waiting)
        found, count = read.get_batch_samples(epoch_iterator, missing, device)
        batches, self._waiting = [*self._waiting, *found], []
        if len(batches) < num_batches:
            check_steps(me.state.global_step, len(batches), num_batches)
            self._waiting = batches
            return [], None
        pairs = [self._shifted(batch) for batch in batches]
        self._tokens_seen = me.state.num_input_tokens_seen  # the same for the whole step
        count = self.selective.denominator(pairs, self._sum_over_ranks, self._tokens_seen)
        if count == 0:
            check_scored(pairs)
        return batches, count

    def _shifted(self, batch: Mapping[str, Any]) -> tuple[Tensor, Columns]:
        """Targets and scores; every score that the rule needs is there."""
        columns = {n: batch[n] for n in BESIDE if n in batch and batch[n] is not None}
        for name in self.selective.rule.needs:
            columns[name] = column_of(batch, name, ADVICE)
        return shifted(column_of(batch, "labels"), columns)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        me: Any = self
        return me.accelerator.reduce(values.to(me.args.device), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the selective loss; in evaluation what the trainer computes without us."""
        if not model.training:
            me: Any = super()
            return me.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets, scores = self._shifted(inputs)
        output = model(**inputs, denominator=num_items_in_batch, tokens_seen=self._tokens_seen)
        self._sums += step_sums(record_of(output, targets, scores))
        # The denominator counts every rank's tokens, and data-parallel wrappers average gradients.
        loss = output.loss * self.accelerator.num_processes  # type: ignore[attr-defined]
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """What the trainer computes without scores, with labels or without."""
        rest = {key: value for key, value in inputs.items() if key not in BESIDE}
        me: Any = super()
        return me.prediction_step(model, rest, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside `loss`, of every step since the last log; `loss_all` compares select ratios."""
        if "loss" in logs:
            found = means(named(self._sum_over_ranks(self._sums).tolist()))
            logs |= {name: found[name] for name in LOGGED if name in found}
            self._sums.zero_()
        me: Any = super()
        me.log(logs, start_time)


def names_of(dataset: Any) -> list[str]:
    """Columns of a dataset of `datasets`; a streamed one may have to be looked at."""
    known = getattr(dataset, "column_names", [])  # others have none to drop
    return list(next(iter(dataset))) if known is None else list(known)


class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
    """`Trainer(..., select_ratio=, scope=)`, or with `selection=`."""


def column_of(batch: Mapping[str, Any], name: str, advice: str = "") -> Tensor:  # (B, T)
    if name not in batch or batch[name] is None:  # some collators write None
        raise ValueError(f"the batch has no {name} (it has {', '.join(sorted(batch))}){advice}")
    return batch[name]


def check_steps(global_step: int, found: int, needed: int) -> None:
    """A stream too short for one step would be read again and again."""
    if global_step == 0:
        raise ValueError(
            f"train_dataset ended after {found} batches, gradient_accumulation_steps is {needed}: "
            "not one step can be taken"
        )


def check_scored(pairs: list[tuple[Tensor, Columns]]) -> None:
    """Nothing was selected: is that because there is no target, or because no score is there?"""
    num_valid = sum(int((targets != IGNORE_INDEX).sum()) for targets, _ in pairs)
    if num_valid:
        raise ValueError(
            f"all of the step's {num_valid} targets on this rank have NaN as score, or weight 0"
        )


def check_plain(args: Any) -> None:
    """backward=selected runs the layers by itself, as plain modules."""
    for name, value in (("torch_compile", args.torch_compile), ("fsdp", args.fsdp)):
        if value:
            raise ValueError(f"{name} is {value}, which backward='selected' does not go with")


def check_trainer(trainer: Any) -> None:
    """Refuse what would change the loss behind its back."""
    args = trainer.args
    sizes = {"tp": trainer.get_tp_size(), "cp": trainer.get_cp_size(), "sp": trainer.get_sp_size()}
    for name, size in sizes.items():
        if size != 1:
            raise ValueError(f"{name}_size is {size}: only data parallelism is supported")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: use torchrun or "
            "accelerate launch, or show it one with CUDA_VISIBLE_DEVICES"
        )
    for name, value in (
        ("label_smoothing_factor", args.label_smoothing_factor),
        ("compute_loss_func", trainer.compute_loss_func),
        ("model_init", trainer.model_init),  # would put another model in place of the one we know
    ):
        if value:
            raise ValueError(f"{name} is {value}, which the selective loss does not use")
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get(LIGER_LOSS, True):
        raise ValueError(
            f"use_liger_kernel would replace the model's forward; its other kernels may be used: "
            f"liger_kernel_config={{{LIGER_LOSS!r}: False}}"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices is False, but the loss is divided once by the tokens "
            "selected on all devices"
        )
