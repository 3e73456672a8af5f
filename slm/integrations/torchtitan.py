"""Selective language modeling in torchtitan 0.3: two losses, and the trainer that feeds them.

B batch, L sequence, D width, V vocabulary, K selected tokens. In your config registry::

    SelectiveTrainer.Config(
        loss=SelectiveChunkedLoss.Config(select_ratio=0.6, num_chunks=8),
        dataloader=...,  # yields ({"input": (B, L), "reference_logprob": (B, L)}, labels)
        ...
    )

or, of a configuration that exists, `selective(llama3_8b(), SelectiveChunkedLoss.Config(...))`.

`labels` are already shifted, as everywhere in torchtitan, and entry i of `reference_logprob` is the
score of label i: float32, natural log, <= 0, NaN where there is none. A validation loader yields no
`reference_logprob`: validation is cross-entropy over every valid token, comparable across ratios.

The loss that is minimised and logged is the mean over the selected tokens of the whole optimizer
step, all micro-batches and data-parallel ranks: their number is known before the first forward
pass. `SelectiveChunkedLoss` scores all tokens without their logits, then lets torchtitan's own
chunked loss run over the selected rows. `SelectiveLoss` is slower: the logits of every token exist,
and scores have their precision (bfloat16 logits change about one selection in a hundred). The
"global_max_loss" that torchtitan logs is exact where every rank has the same share of candidates;
"slm/loss_all" beside it is the mean over every valid token.

    torchrun ... -m torchtitan.train --module my.registry --config mine --loss.select_ratio 0.4
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.config import CompileConfig
from torchtitan.distributed.utils import dist_sum_tensor
from torchtitan.trainer import Trainer

from slm.integrations.loss import COLUMN, is_candidate
from slm.integrations.signatures import check_parameters
from slm_kernels import (
    max_selected,
    select_count,
    select_top_k,
    selective_cross_entropy_from_logits,
    token_cross_entropy,
)
from slm_kernels.ops import refuse
from slm_kernels.selection import SCOPES, check_select_ratio

MADE_FOR = "torchtitan 0.3.0"
_CALL = ("pred", "labels", "global_valid_tokens")
_STEP = ("labels", "global_valid_tokens")
for _function, _names in (
    (BaseLoss.__call__, _CALL),
    (ChunkedLossWrapper.__call__, (*_CALL, "loss_inputs")),
    (ChunkedLossWrapper.set_lm_head, ("lm_head",)),
    (Trainer.post_dataloading_process, ("input_dict", "labels")),
    (Trainer._forward_backward_body, ("inputs", *_STEP, "extra_kwargs")),
    (Trainer.forward_backward_step, ("input_dict", *_STEP)),
    (Trainer.train_step, ("data_iterator",)),
    (MetricsProcessor.should_log, ("step",)),
    (BaseLogger.log, ("metrics", "step")),
):
    check_parameters(_function, _names, MADE_FOR)

Batch = tuple[dict[str, Tensor], Tensor]  # what a dataloader yields: named inputs, labels


class _Selective:
    """What both losses share: their selection, and the scores of the batch that comes next.

    The scores are bound to the loss, not passed to it: a wrapper that splits the batch would split
    them alike, then K tokens of every part would be selected, and nobody would notice.
    """

    def __init__(self, select_ratio: float, scope: str):
        check_select_ratio(select_ratio)
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
        self.select_ratio, self.scope = select_ratio, scope
        self.group: ProcessGroup | None = None  # whose tokens are ranked, with scope "global"
        self._bound: Tensor | None = None
        self.sum_over_all = torch.tensor(0.0)  # (), loss of every valid token of the last batch

    def bind(
        self,
        reference_logprob: Tensor,  # (B, L), float32, <= 0; NaN: no score
    ) -> None:
        """The next call, and only that one, is about this batch."""
        self._bound = reference_logprob

    def _reference_loss(
        self,
        pred: Tensor,  # (B, L, ...)
        labels: Tensor,  # (B, L)
        others: dict[str, Any],
    ) -> Tensor | None:  # (B, L); None for validation
        bound, self._bound = self._bound, None
        if COLUMN in others:
            raise ValueError(f"{COLUMN} was passed to the loss: call its bind({COLUMN}) first")
        if isinstance(pred, DTensor):
            raise ValueError(
                f"{type(self).__name__} ranks whole local tensors, got a DTensor with placements "
                f"{pred.placements}: parallelism.tensor_parallel_degree must be 1"
            )
        if bound is None:
            if not torch.is_grad_enabled():
                return None
            raise ValueError(
                f"{type(self).__name__} got labels {tuple(labels.shape)} to train on and no "
                f"{COLUMN}: SelectiveTrainer binds it, and ChunkedLossWrapper cannot hold this "
                "loss (use SelectiveChunkedLoss)"
            )
        if bound.shape != labels.shape:
            raise ValueError(
                f"{type(self).__name__} was called with labels {tuple(labels.shape)} of a batch "
                f"whose {COLUMN} is {tuple(bound.shape)}: a selection needs the whole batch, so "
                "ChunkedLossWrapper cannot hold this loss (use SelectiveChunkedLoss)"
            )
        wrong = (labels != IGNORE_INDEX) & (bound > 0)
        return -refuse(bound, wrong, bound, f"{COLUMN} must be <= 0")


class SelectiveLoss(_Selective, BaseLoss):
    """Cross-entropy of the selected tokens, from logits that somebody made."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        select_ratio: float = 0.6
        """The paper's k%, in (0, 1]."""

        scope: str = "batch"
        """What tokens are ranked against: "sequence", "batch" (a micro-batch) or "global"."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        _Selective.__init__(self, config.select_ratio, config.scope)
        # The selection's operators are opaque to a compiler; what validation runs is not.
        self._over_all = CrossEntropyLoss.Config().build(compile_config=compile_config)

    def __call__(
        self,
        pred: Tensor,  # (B, L, V), logits
        labels: Tensor,  # (B, L)
        global_valid_tokens: Tensor | None = None,  # (), what the sum is divided by
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reference_loss = self._reference_loss(pred, labels, kwargs)
        if reference_loss is None:
            return self._over_all(pred, labels, global_valid_tokens)
        out = selective_cross_entropy_from_logits(
            pred,
            labels,
            reference_loss,
            select_ratio=self.select_ratio,
            scope=self.scope,
            group=self.group,
            denominator=global_valid_tokens,
            ignore_index=IGNORE_INDEX,
        )
        self.sum_over_all = out.token_loss.sum()
        return out.loss, {}


class SelectiveChunkedLoss(_Selective, ChunkedLossWrapper):
    """Score all tokens, select once in the whole batch, train on the selected rows in chunks.

    The first pass goes through `slm_kernels`: no logits, and float32 scores from bfloat16 operands.
    The second is ChunkedLossWrapper with CrossEntropyLoss over (1, K, D), so that FSDP and
    gradient accumulation are torchtitan's own, and unselected rows cost no backward arithmetic.
    The batch's length need not be a multiple of `num_chunks`, except for validation. It asks the
    device nothing, but nobody has run it within a CUDA graph yet (training.disable_cuda_graphs).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        select_ratio: float = 0.6
        """The paper's k%, in (0, 1]."""

        scope: str = "batch"
        """What tokens are ranked against: "sequence", "batch" (a micro-batch) or "global"."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        if type(config.loss_fn) is not CrossEntropyLoss.Config:
            raise ValueError(
                "SelectiveChunkedLoss minimises the cross-entropy of what it selects: loss.loss_fn "
                f"must be CrossEntropyLoss.Config, got {type(config.loss_fn).__qualname__}"
            )
        _Selective.__init__(self, config.select_ratio, config.scope)
        ChunkedLossWrapper.__init__(self, config, compile_config=compile_config)

    def set_lm_head(self, lm_head: nn.Module) -> None:
        if type(lm_head).forward is not nn.Linear.forward:
            raise ValueError(
                "SelectiveChunkedLoss scores tokens with the weight of lm_head, which must be a "
                f"plain linear layer, got {type(lm_head).__qualname__}: use SelectiveLoss"
            )
        super().set_lm_head(lm_head)

    def __call__(
        self,
        pred: Tensor,  # (B, L, D), last hidden states
        labels: Tensor,  # (B, L)
        global_valid_tokens: Tensor | None = None,  # (), what the sum is divided by
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reference_loss = self._reference_loss(pred, labels, loss_inputs)
        if reference_loss is None:
            return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
        selected = self._select(pred, labels, reference_loss)
        count = selected.sum()
        rows = self._rows(selected)
        live = torch.arange(len(rows), device=rows.device) < count
        row_labels = labels.flatten()[rows].masked_fill(~live, IGNORE_INDEX)
        hidden = pred.flatten(0, 1).index_select(0, rows)
        denominator = count.clamp(min=1) if global_valid_tokens is None else global_valid_tokens
        return super().__call__(hidden[None], row_labels[None], denominator)

    def _select(
        self,
        hidden: Tensor,  # (B, L, D)
        labels: Tensor,  # (B, L)
        reference_loss: Tensor,  # (B, L)
    ) -> Tensor:  # (B, L), bool
        head = self.lm_head
        assert isinstance(head, nn.Linear), "set_lm_head comes first"
        if isinstance(head, FSDPModule):
            head.unshard()  # the second pass needs it as well, and reshards it
        if isinstance(head.weight, DTensor):
            raise ValueError(
                f"lm_head.weight is a DTensor with placements {head.weight.placements}: "
                "parallelism.tensor_parallel_degree must be 1"
            )
        with torch.no_grad():
            token_loss = token_cross_entropy(hidden, head.weight, labels, bias=head.bias).loss
            self.sum_over_all = token_loss.sum()
            candidates = (labels != IGNORE_INDEX) & ~reference_loss.isnan()
            scores = token_loss - reference_loss
            return select_top_k(
                scores, candidates, self.select_ratio, scope=self.scope, group=self.group
            )

    def _rows(
        self,
        selected: Tensor,  # (B, L), bool
    ) -> Tensor:  # (a multiple of num_chunks,), int64: the selected rows in order, then others
        """As many as can be selected in a batch of this shape: the device is not asked."""
        capacity = max_selected(selected.shape, self.select_ratio, self.scope)
        if capacity is None:
            capacity = int(selected.sum())
        order = selected.flatten().argsort(descending=True, stable=True)[: max(1, capacity)]
        return F.pad(order, (0, -len(order) % self.num_chunks))


class SelectiveTrainer(Trainer):
    """torchtitan's Trainer, whose loss is SelectiveLoss or SelectiveChunkedLoss."""

    loss_fn: SelectiveLoss | SelectiveChunkedLoss  # type: ignore[assignment]

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config):
        check_config(config)
        super().__init__(config)
        if self.loss_fn.scope == "global":
            if not self.parallel_dims.dp_enabled:
                raise ValueError("loss.scope 'global' needs several data-parallel ranks, got 1")
            self.loss_fn.group = self.parallel_dims.get_mesh("batch").get_group()

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        self._num_selected = self._count_selected(batches)
        self._sum_over_all = torch.zeros((), device=self.device)
        mine = iter(batches)
        super().train_step(mine)
        assert next(mine, None) is None, f"{MADE_FOR} reads every micro-batch of a step"
        if self.metrics_processor.should_log(self.step):
            self._log_over_all(
                torch.stack([(labels != IGNORE_INDEX).sum() for _, labels in batches])
            )

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, Tensor] | list[dict[str, Tensor]],
        labels: Tensor | list[Tensor],
        global_valid_tokens: Tensor,
    ) -> Tensor:
        """The sum is over selected tokens, and so is the number that it is divided by."""
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=self._num_selected
        )
        self._sum_over_all += self.loss_fn.sum_over_all
        return loss

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        others = {key: value for key, value in input_dict.items() if key != COLUMN}
        inputs, labels, extra_kwargs = super().post_dataloading_process(others, labels)
        return inputs, labels, extra_kwargs | {COLUMN: input_dict[COLUMN]}

    def _forward_backward_body(
        self,
        inputs: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor,
        extra_kwargs: dict[str, Any],
    ) -> Tensor:
        # Bound here and not earlier: what a CUDA graph replays reads its own copy of the arguments.
        self.loss_fn.bind(extra_kwargs[COLUMN])
        others = {key: value for key, value in extra_kwargs.items() if key != COLUMN}
        return super()._forward_backward_body(inputs, labels, global_valid_tokens, others)

    def _count_selected(self, batches: list[Batch]) -> Tensor:  # (), int64, on self.device
        """Selected tokens of the step on all ranks; it depends on labels and NaNs alone."""
        axis = -1 if self.loss_fn.scope == "sequence" else None
        candidates = torch.stack(
            [num_candidates(inputs, labels, axis, self.step) for inputs, labels in batches]
        )
        together = self.loss_fn.scope == "global"
        ranked = self._over_ranks(candidates) if together else candidates
        total = select_count(ranked, self.loss_fn.select_ratio).sum()
        total = total if together else self._over_ranks(total)
        if not candidates.any() and int(total) == 0:
            raise ValueError(f"step {self.step}: no token has a label and a {COLUMN}")
        return total

    def _log_over_all(
        self,
        num_valid: Tensor,  # (micro-batches,)
    ) -> None:
        """To TensorBoard and W&B: comparable across ratios, as the selected tokens' loss is not."""
        mean = self._over_ranks(self._sum_over_all) / self._over_ranks(num_valid.sum())
        metrics = {"slm/loss_all": mean.item(), "slm/num_selected": int(self._num_selected)}
        self.metrics_processor.logger.log(metrics, self.step)

    def _over_ranks(self, counts: Tensor) -> Tensor:
        counts = counts.to(self.device)
        if not self.parallel_dims.dp_enabled:
            return counts
        return dist_sum_tensor(counts, self.parallel_dims.get_mesh("batch"))


def selective(
    config: Trainer.Config,
    loss: SelectiveLoss.Config | SelectiveChunkedLoss.Config,
) -> SelectiveTrainer.Config:
    """The same run, trained on a selection; only the loss differs."""
    values: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}
    values["loss"] = loss
    return SelectiveTrainer.Config(**values)


def check_config(config: SelectiveTrainer.Config) -> None:
    """Raise ValueError, naming the field, for what would select wrongly or cannot run."""
    if not isinstance(config.loss, SelectiveLoss.Config | SelectiveChunkedLoss.Config):
        raise ValueError(
            "SelectiveTrainer needs loss=SelectiveChunkedLoss.Config or SelectiveLoss.Config, got "
            f"{type(config.loss).__qualname__}"
        )
    parallelism = config.parallelism
    for name in ("pipeline", "context", "tensor"):
        degree = getattr(parallelism, f"{name}_parallel_degree")
        if degree > 1:
            raise ValueError(
                f"parallelism.{name}_parallel_degree must be 1 for a selection over whole batches, "
                f"got {degree}"
            )
    if parallelism.spmd_backend == "full_dtensor":
        raise ValueError(
            "parallelism.spmd_backend must be spmd_types or partial_dtensor, got full_dtensor"
        )
    if config.debug.spmd_typechecking:
        raise ValueError("debug.spmd_typechecking must be False: a selection has no SPMD type")
    reads_back = isinstance(config.loss, SelectiveLoss.Config) or config.loss.scope == "global"
    if reads_back and not config.training.disable_cuda_graphs:
        raise ValueError(
            "training.disable_cuda_graphs must be True for SelectiveLoss and for scope 'global', "
            "which ask the device how many tokens were selected; got False"
        )


def num_candidates(
    inputs: dict[str, Tensor],
    labels: Tensor,  # (B, L)
    axis: int | None,
    step: int,
) -> Tensor:  # () or, with axis -1, (B,): labelled tokens that have a reference score
    if COLUMN not in inputs:
        raise ValueError(
            f"step {step}: the dataloader must yield {COLUMN} beside the input, got "
            f"{', '.join(inputs)}"
        )
    scores, valid = inputs[COLUMN], labels != IGNORE_INDEX
    if scores.shape != labels.shape or scores.dtype != torch.float32:
        raise ValueError(
            f"step {step}: {COLUMN} must be float32 {tuple(labels.shape)} as the labels, got "
            f"{scores.dtype} {tuple(scores.shape)}"
        )
    if (valid & (scores > 0)).any():
        raise ValueError(
            f"step {step}: {COLUMN} must be <= 0, got {float(scores[valid & (scores > 0)][0])}"
        )
    return is_candidate(labels, scores).sum(axis)
