"""Selective language modeling in TRL's `SFTTrainer` (made for trl 1.16).

    SelectiveSFTTrainer(model, SFTConfig("out"), train_dataset=rows, select_ratio=0.6).train()

experiments/doors/README.md has this with rows of text and of chats. `train_dataset` is tokenised
(`input_ids`; by need `labels`, `assistant_masks`, or `completion_mask` with
completion_only_loss=True) and has a column `reference_logprob`, made row by row by
slm.integrations.datasets.score_dataset. It may be packed (packing_strategy "bfd"), padding-free and
trained with LoRA. A score depends on what stands before its token, so preparations that take that
away are refused: packing across documents ("wrapped"), cutting them in the middle ("bfd_split") or
at their beginning. For those, pack first, score the packed rows, and pass them without packing.

`SelectiveDPOTrainer`, over `DPOTrainer`, is slm/integrations/dpo.py.

Everything else is SelectiveTrainerMixin's (slm/integrations/transformers.py); in training, entropy
and accuracy are measured on the steps that are logged, since they cost a pass over the vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import SFTTrainer

from slm.integrations.dpo import SelectiveDPOTrainer
from slm.integrations.loss import BESIDE, SCORES
from slm.integrations.signatures import check_attributes, check_parameters
from slm.integrations.transformers import SelectiveTrainerMixin, names_of
from slm.store.windows import WEIGHT

__all__ = ["SelectiveDPOTrainer", "SelectiveSFTTrainer"]

MADE_FOR = "trl 1.16"
check_parameters(
    SFTTrainer._prepare_dataset,
    ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    MADE_FOR,
)
check_parameters(pack_dataset, ("dataset", "seq_length", "strategy"), MADE_FOR)
check_attributes(SFTTrainer, ("compute_loss", "_set_signature_columns_if_needed"), MADE_FOR)


class SelectiveSFTTrainer(SelectiveTrainerMixin, SFTTrainer):
    """`SFTTrainer(..., select_ratio=, scope=)`, or with `selection=`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        loss_type = vars(self.args)["loss_type"]
        if loss_type != "nll":
            raise ValueError(f"loss_type is {loss_type!r}, which the selective loss does not use")

    def check_rows(self, names: list[str]) -> None:
        """Of the dataset as it is trained on, prepared by TRL or not."""
        check_columns(names, self.selective.rule.needs)
        if "seq_lengths" in names and not self.padding_free:
            raise ValueError(
                "the rows hold several documents (seq_lengths), but padding_free is False, so "
                "that they would see each other: set padding_free=True and max_length=None"
            )

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """As TRL prepares a dataset, with the scores beside the tokens all the way.

        TRL itself would leave the column out where it packs, and whole where it truncates.
        """
        names = names_of(dataset)
        prepare = super()._prepare_dataset
        if dataset_name != "train" and not {*SCORES} & {*names}:
            if WEIGHT in names:  # which evaluation does not look at, and TRL would not cut
                dataset = dataset.remove_columns(WEIGHT)
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        check_columns(names, self.selective.rule.needs)
        check_contexts(args, packing, "seq_lengths" in names)
        if "completion_mask" in names and "labels" not in names and not self.completion_only_loss:
            raise ValueError(
                "train_dataset has a completion_mask, but completion_only_loss is "
                f"{args.completion_only_loss}, so that prompts would be trained on: set it to "
                "True, or remove the column"
            )
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        dataset = prepare(dataset, processing_class, uncut, False, None, dataset_name)
        by_token = [
            name for name in ("input_ids", "labels", *BESIDE) if name in names or name == "labels"
        ]
        lengths = ["seq_lengths"] * ("seq_lengths" in names)  # of rows that are packed already
        dataset = dataset.select_columns([*by_token, *lengths])
        if packing:
            dataset = pack(dataset, args)
        elif args.max_length is not None:
            dataset = truncate(dataset, by_token, args.max_length)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self._count_tokens(inputs)
            if (self.state.global_step + 1) % self.state.logging_steps == 0:
                self._measure(model, inputs)
        return loss

    def _count_tokens(self, inputs: Mapping[str, Any]) -> None:
        if "attention_mask" in inputs:
            count = inputs["attention_mask"].sum()
        else:
            count = torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
        self._total_train_tokens += int(self._sum_over_ranks(count))
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    @torch.no_grad()
    def _measure(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Entropy and accuracy over every target, by TRL's own pass, without dropout.

        So no random number is drawn: how often is logged does not change what is trained.
        """
        rest = {key: value for key, value in inputs.items() if key not in BESIDE}
        model.eval()
        found = model(**rest, use_cache=False, fused_lm_head=True)
        model.train()
        sums = torch.stack([found.label_mask.sum(), found.entropy.sum(), found.is_top1.sum()])
        count, entropy, correct = self._sum_over_ranks(sums.float()).tolist()
        self._metrics["train"]["entropy"].append(entropy / max(1.0, count))
        self._metrics["train"]["mean_token_accuracy"].append(correct / max(1.0, count))


def check_columns(names: list[str], needed: Sequence[str]) -> None:
    for name in ("input_ids", *needed):
        if name not in names:
            to_score = "slm.integrations.datasets.score_dataset adds it"
            advice = "tokenise before you score" if name == "input_ids" else to_score
            raise ValueError(f"train_dataset has no {name} (it has {', '.join(names)}): {advice}")
    if "position_ids" in names:
        raise ValueError(
            "train_dataset has position_ids, which SFTTrainer drops; where a row is several "
            "documents give their lengths as seq_lengths"
        )


def check_contexts(args: Any, packing: bool, is_packed: bool) -> None:
    """Refuse what puts a token behind other tokens than it was scored behind."""
    if packing and args.packing_strategy != "bfd":
        raise ValueError(
            f"packing_strategy is {args.packing_strategy!r}, which gives tokens another context "
            'than they were scored in; use "bfd", or pack first and score the packed rows'
        )
    if packing and is_packed:
        raise ValueError("packing is True, but the rows have seq_lengths: they are packed already")
    if not packing and args.max_length is not None and args.truncation_mode != "keep_start":
        raise ValueError(
            f"truncation_mode is {args.truncation_mode!r}, which cuts off what tokens were scored "
            'behind; use "keep_start", or truncate first and then score'
        )


def pack(dataset: Any, args: Any) -> Any:
    if args.max_length is None:
        raise ValueError("packing is True, but max_length is None")
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    return pack_dataset(dataset, args.max_length, args.packing_strategy)


def truncate(dataset: Any, by_token: list[str], max_length: int) -> Any:
    """The first `max_length` tokens of every row; rows without a target are dropped."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name][:max_length] for name in by_token}

    def has_target(row: dict[str, Any]) -> bool:
        return any(label != -100 for label in row["labels"])

    return dataset.map(cut).filter(has_target)
