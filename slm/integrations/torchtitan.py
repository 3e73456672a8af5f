"""Selective language modeling in torchtitan 0.3: two losses, and the trainer that feeds them.

B batch, L sequence, D width, V vocabulary, K selected tokens. In your config registry::

    SelectiveTrainer.Config(
        loss=SelectiveChunkedLoss.Config(select_ratio=0.6, num_chunks=8),
        dataloader=...,  # yields ({"input": (B, L), "reference_logprob": (B, L)}, labels)
        ...
    )

or, of a configuration that exists, `selective(llama3_8b(), SelectiveChunkedLoss.Config(...))`.

`labels` are already shifted, as everywhere in torchtitan, and entry i of `reference_logprob` is the
score of label i: float32, natural log, <= 0, NaN where there is none; `token_weight` likewise. A
validation loader yields none: validation is cross-entropy over every valid token, comparable.

The loss that is minimised and logged is the mean over the selected tokens of the whole optimizer
step, all micro-batches and data-parallel ranks: their number is known before the first forward
pass. `SelectiveChunkedLoss` scores all tokens without their logits, then lets torchtitan's own
chunked loss run over the selected rows. `SelectiveLoss` is slower: the logits of every token exist,
and scores have their precision (bfloat16 logits change about one selection in a hundred). The
"global_max_loss" that torchtitan logs is exact where every rank has the same share of candidates;
"slm/loss_all" beside it is the mean over every valid token.

    torchrun ... -m torchtitan.train --module my.registry --config mine --loss.select_ratio 0.4
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.config import CompileConfig
from torchtitan.distributed.utils import dist_sum_tensor
from torchtitan.trainer import Trainer

from slm.integrations.loss import BESIDE, COLUMN, LOGGED, Columns, record_of
from slm.integrations.loss import SelectiveLoss as DoorLoss
from slm.integrations.signatures import check_parameters
from slm.selection.books import means, named, no_sums, step_sums
from slm_kernels import WeightedCrossEntropy, token_cross_entropy
from slm_kernels import weighted_cross_entropy_from_logits as from_logits

MADE_FOR = "torchtitan 0.3.0"
_CALL, _STEP = ("pred", "labels", "global_valid_tokens"), ("labels", "global_valid_tokens")
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

Loss = Callable[..., WeightedCrossEntropy]
Batch = tuple[dict[str, Tensor], Tensor]  # what a dataloader yields: named inputs, labels
COLUMNS = (*BESIDE, "window", "epoch")  # of the named inputs, those that are for the loss


@dataclass(kw_only=True)
class _Rule:
    select_ratio: float | None = None
    """The paper's k%, in (0, 1]; 0.6 where `selection` is a word."""

    scope: str | None = None
    """Rank a token against: "sequence", "batch" (a micro-batch, the default) or "global"."""

    selection: Any = "excess"
    """A rule of slm.selection: its word, or an object without the two fields above."""


def selective_of(config: _Rule) -> DoorLoss:
    default = 0.6 if isinstance(config.selection, str) else None
    ratio = default if config.select_ratio is None else config.select_ratio
    found = DoorLoss(ratio, config.scope, config.selection)
    found.check_step("torchtitan", True, "its loss is divided before the first forward pass")
    return found


class _Selective:
    """What both losses share: their rule, and the scores of the batch that comes next.

    The scores are bound to the loss, not passed to it: a wrapper that splits the batch would split
    them alike, then tokens would be selected in every part, and nobody would notice.
    """

    def __init__(self, config: _Rule):
        self.selective = selective_of(config)
        self.tokens_seen = 0  # when the step began
        self.sums = no_sums(torch.device("cpu"))  # of the last batch
        self._bound: Columns | None = None

    def bind(self, reference_logprob: Tensor | None = None, **columns: Tensor) -> None:
        """(B, L) each, NaN: no score. The next call, and only that one, is about this batch."""
        given = {} if reference_logprob is None else {COLUMN: reference_logprob}
        self._bound = given | columns

    def _columns(self, pred: Tensor, labels: Tensor, others: dict[str, Any]) -> Columns | None:
        """What was bound for (B, L, ...) and (B, L); None for validation."""
        bound, self._bound = self._bound, None
        if passed := [name for name in BESIDE if name in others]:
            raise ValueError(f"{passed[0]} was passed to the loss: call its bind() first")
        if isinstance(pred, DTensor):
            raise ValueError(
                f"{type(self).__name__} ranks whole local tensors, got a DTensor with placements "
                f"{pred.placements}: parallelism.tensor_parallel_degree must be 1"
            )
        if bound is None and not torch.is_grad_enabled():
            return None
        shapes = [tuple(bound[name].shape) for name in BESIDE if name in bound] if bound else None
        if bound is None or any(shape != labels.shape for shape in shapes or ()):
            raise ValueError(
                f"{type(self).__name__} got labels {tuple(labels.shape)} to train on and scores of "
                f"{shapes}: SelectiveTrainer binds those of the whole batch, and "
                "ChunkedLossWrapper cannot hold this loss (use SelectiveChunkedLoss)"
            )
        return bound

    def _by(
        self, loss: Loss, labels: Tensor, columns: Columns, denominator: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if denominator is None:
            denominator = self.selective.denominator([(labels, columns)], lambda count: count)
        out = self.selective.through(loss, labels, columns, denominator, self.tokens_seen)
        self.sums = step_sums(record_of(out, labels, columns))
        return out.loss, {}


class SelectiveLoss(_Selective, BaseLoss):
    """Cross-entropy of the selected tokens, from logits that somebody made."""

    @dataclass(kw_only=True, slots=True)
    class Config(_Rule, BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        _Selective.__init__(self, config)
        # The selection's operators are opaque to a compiler; what validation runs is not.
        self._over_all = CrossEntropyLoss.Config().build(compile_config=compile_config)

    def __call__(
        self,
        pred: Tensor,  # (B, L, V), logits
        labels: Tensor,  # (B, L)
        global_valid_tokens: Tensor | None = None,  # (), what the sum is divided by
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        columns = self._columns(pred, labels, kwargs)
        if columns is None:
            return self._over_all(pred, labels, global_valid_tokens)
        return self._by(partial(from_logits, pred), labels, columns, global_valid_tokens)


class _RowLoss(CrossEntropyLoss):
    """With a weight for every row, summed: what ChunkedLossWrapper calls for a chunk."""

    def __call__(
        self,
        pred: Tensor,  # (1, C, V)
        labels: Tensor,  # (1, C)
        global_valid_tokens: Any = None,
        token_weight: Tensor | None = None,  # (1, C)
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if token_weight is None:
            return super().__call__(pred, labels, global_valid_tokens, **kwargs)
        # A row without a weight has no label, and no loss.
        losses = F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return (losses * token_weight.flatten()).sum() / global_valid_tokens, {}


class SelectiveChunkedLoss(_Selective, ChunkedLossWrapper):
    """Score all tokens, choose once in the whole batch, train on the rows with a weight in chunks.

    The first pass goes through `slm_kernels`: no logits, float32 scores. The second, of (1, K, D),
    is torchtitan's own; rows without a weight cost no backward. The device is asked nothing, but
    nobody has run it within a CUDA graph yet (training.disable_cuda_graphs).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_Rule, ChunkedLossWrapper.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        if type(config.loss_fn) is not CrossEntropyLoss.Config:
            raise ValueError(
                "SelectiveChunkedLoss minimises the cross-entropy of what it selects: loss.loss_fn "
                f"must be CrossEntropyLoss.Config, got {type(config.loss_fn).__qualname__}"
            )
        _Selective.__init__(self, config)
        ChunkedLossWrapper.__init__(self, config, compile_config=compile_config)
        self.loss_fn = _RowLoss(config.loss_fn, compile_config=compile_config)

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
        columns = self._columns(pred, labels, loss_inputs)
        if columns is None:
            return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
        return self._by(partial(self._in_chunks, pred), labels, columns, global_valid_tokens)

    def _in_chunks(
        self,
        hidden: Tensor,  # (B, L, D)
        targets: Tensor,  # (B, L)
        token_weight: Tensor | Callable[[Tensor], Tensor],  # (B, L)
        denominator: Tensor,
    ) -> WeightedCrossEntropy:
        token_loss = self._score(hidden, targets)
        with torch.no_grad():
            made = token_weight(token_loss) if callable(token_weight) else token_weight
            weight = made.to(token_loss.dtype)
            order = self._rows(weight != 0)
            spare = (0, -len(order) % self.num_chunks)  # row 0 again, without a weight
            rows, row_weight = F.pad(order, spare), F.pad(weight.flatten()[order], spare)
            row_labels = targets.flatten()[rows].masked_fill(row_weight == 0, IGNORE_INDEX)
        chosen = hidden.flatten(0, 1).index_select(0, rows)
        loss, _ = super().__call__(
            chosen[None], row_labels[None], denominator.clamp(min=1), token_weight=row_weight[None]
        )
        return WeightedCrossEntropy(loss, token_loss, weight)

    @torch.no_grad()
    def _score(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (B, L, D), (B, L) -> (B, L)
        head = self.lm_head
        assert isinstance(head, nn.Linear), "set_lm_head comes first"
        if isinstance(head, FSDPModule):
            head.unshard()  # the second pass needs it as well, and reshards it
        if isinstance(head.weight, DTensor):
            raise ValueError(
                f"lm_head.weight is a DTensor with placements {head.weight.placements}: "
                "parallelism.tensor_parallel_degree must be 1"
            )
        return token_cross_entropy(hidden, head.weight, labels, bias=head.bias).loss

    def _rows(self, chosen: Tensor) -> Tensor:  # (B, L) bool -> (capacity,) int64
        """Chosen rows in order, then others: as many as this shape can have, unasked."""
        capacity = self.selective.rule.max_rows({"targets": chosen}, self.tokens_seen)
        if capacity is None:
            capacity = int(chosen.sum())
        return chosen.flatten().argsort(descending=True, stable=True)[: max(1, capacity)]


class SelectiveTrainer(Trainer):
    """torchtitan's Trainer, whose loss is SelectiveLoss or SelectiveChunkedLoss."""

    loss_fn: SelectiveLoss | SelectiveChunkedLoss  # type: ignore[assignment]

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config):
        check_config(config)
        super().__init__(config)
        if self.loss_fn.selective.rule.scope == "global" and not self.parallel_dims.dp_enabled:
            raise ValueError("loss.scope 'global' needs several data-parallel ranks, got 1")

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        num_tokens = sum(labels.numel() for _, labels in batches)
        self.loss_fn.tokens_seen = (self.step - 1) * num_tokens * self.parallel_dims.world_size
        self._denominator = self._count(batches)
        self._sums = no_sums(self.device)
        mine = iter(batches)
        super().train_step(mine)
        assert next(mine, None) is None, f"{MADE_FOR} reads every micro-batch of a step"
        if self.metrics_processor.should_log(self.step):
            self._log()

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, Tensor] | list[dict[str, Tensor]],
        labels: Tensor | list[Tensor],
        global_valid_tokens: Tensor,
    ) -> Tensor:
        """The sum is over chosen tokens, and so is the number that it is divided by."""
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=self._denominator
        )
        self._sums += self.loss_fn.sums
        return loss

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        ours, others = split(input_dict)
        inputs, labels, extra_kwargs = super().post_dataloading_process(others, labels)
        return inputs, labels, extra_kwargs | ours

    def _forward_backward_body(
        self,
        inputs: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor,
        extra_kwargs: dict[str, Any],
    ) -> Tensor:
        # Bound here and not earlier: what a CUDA graph replays reads its own copy of the arguments.
        ours, others = split(extra_kwargs)
        self.loss_fn.bind(**ours)
        return super()._forward_backward_body(inputs, labels, global_valid_tokens, others)

    def _count(self, batches: list[Batch]) -> Tensor:  # (), int64, on self.device
        """What the step's loss is divided by; it depends on labels and NaNs alone."""
        selective, pairs = self.loss_fn.selective, [(labels, inputs) for inputs, labels in batches]
        try:
            live = [selective.candidates(*pair)["targets"] != IGNORE_INDEX for pair in pairs]
            total = selective.denominator(pairs, self._over_ranks, self.loss_fn.tokens_seen)
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}") from None
        if not any(mask.any() for mask in live) and int(total) == 0:
            raise ValueError(f"step {self.step}: no token has a label and a score")
        return total

    def _log(self) -> None:
        """To TensorBoard and W&B: comparable across ratios, as the selected tokens' loss is not."""
        sums = named(self._over_ranks(self._sums).tolist())
        metrics = {f"slm/{name}": mean for name, mean in means(sums).items() if name in LOGGED}
        metrics["slm/num_selected"] = sums["num_selected"]
        self.metrics_processor.logger.log(metrics, self.step)

    def _over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        if not self.parallel_dims.dp_enabled:
            return values
        return dist_sum_tensor(values, self.parallel_dims.get_mesh("batch"))


def split(named: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is for the loss, and the rest."""
    ours = {name: named[name] for name in COLUMNS if name in named}
    return ours, {name: value for name, value in named.items() if name not in ours}


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
    rule = selective_of(config.loss).rule
    reads_back = isinstance(config.loss, SelectiveLoss.Config) or rule.scope == "global"
    moves = any(len(schedule.points) > 1 for schedule in rule.schedules)
    if (reads_back or moves) and not config.training.disable_cuda_graphs:
        raise ValueError(
            "training.disable_cuda_graphs must be True for SelectiveLoss and for scope 'global', "
            "which ask the device how many tokens were selected, and for a schedule, which a graph "
            "would not follow; got False"
        )
