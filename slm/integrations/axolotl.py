"""Selective language modeling in axolotl (made for axolotl 0.19): a plugin, named in the YAML.

    plugins: [slm.integrations.axolotl.SelectivePlugin]
    slm_select_ratio: 0.6        # of the scored targets; slm_scope: batch and slm_selection: excess
    # or a rule of slm.selection with its fields: slm_selection: {rule: sigmoid, temperature: 1}
    slm_backward: exact          # selected: gradients along the selected tokens alone
    datasets:
      - path: scored/            # rows of input_ids, attention_mask, labels and reference_logprob
        type:                    # empty: tokenised before it was scored
    sample_packing: true
    attn_implementation: flash_attention_2   # or another that keeps packed documents apart
    excess_length_strategy: drop

`reference_logprob` has one log-prob (natural log) a token, NaN (in JSON: null) where there is none.
slm.integrations.datasets.score_dataset makes it; save the dataset with `save_to_disk`, or as
Parquet or JSON. A dataset with all four columns passes through axolotl as it is. Every other
`type:` makes new columns out of text and leaves the scores behind, which the trainer refuses.

What the plugin adds to SelectiveTrainerMixin (slm/integrations/transformers.py)

    the config     refuses, before the model is loaded, what would cut, move or lose the scores, or
                   show a token other documents than it was scored behind
    the model      refused with sample_packing if it looks back past the beginning of a document
    the collators  scores go where sample packing puts their tokens, in training and evaluation; the
                   first token of a document is never selected, since what stands before it in the
                   packed row is another document
    the cache      axolotl names a prepared dataset after its path and settings. New scores at the
                   same path would not be seen, so it is prepared in a folder of its contents' name
    the division   average_tokens_across_devices, which axolotl switches off, is on

Evaluation, `loss_all` and labels are axolotl's own, so in packed rows they count the first token of
a document. axolotl logs `ppl` as exp(loss), of the selected tokens: compare exp(loss_all) instead.

axolotl prints that it could not import a plugin, and trains on without it. So what is wrong in here
raises a RuntimeError; a misspelt module, or no slm-trainer installed, does not. A run is selective
if it logs `kept_frac`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, model_validator

    from slm.checks import check_value
    from slm.integrations.collator import ReferenceCollator, scores_in
    from slm.integrations.loss import BESIDE, COLUMN, SelectiveLoss
    from slm.integrations.signatures import check_attributes, check_parameters
    from slm.integrations.transformers import BACKWARD, SelectiveTrainerMixin, causal_lm
    from slm.model.head import check_documents

    MADE_FOR = "axolotl 0.19"
    check_parameters(BasePlugin.get_trainer_cls, ("cfg",), MADE_FOR)
    check_parameters(BasePlugin.get_training_args, ("cfg",), MADE_FOR)
    check_parameters(BasePlugin.load_datasets, ("cfg", "preprocess"), MADE_FOR)
    check_attributes(BasePlugin, ("get_input_args", "get_training_args_mixin"), MADE_FOR)
except ImportError as error:  # axolotl would print it, and train on every token
    raise RuntimeError(f"slm.integrations.axolotl cannot be used: {error}") from error

OTHER_TRAINER = "has a trainer and a loss of its own"
NO_SCORES = "tokenises text on the way, where it has no scores"
REFUSED = {
    "rl": OTHER_TRAINER,
    "reward_model": OTHER_TRAINER,
    "process_reward_model": OTHER_TRAINER,
    "trainer_cls": OTHER_TRAINER,
    "use_eaft": OTHER_TRAINER,
    "pretraining_dataset": NO_SCORES,
    "streaming": NO_SCORES,
    "use_pose": "puts tokens at other positions than they were scored at",
}
PROBE_TOKENS, LEAK_TOLERANCE = 8, 1e-3
OWN_FILES = ("cache-", "tmp")  # what datasets writes beside the files of a dataset that it reads


# ---- the config ---------------------------------------------------------------------------------


class SelectiveArgs(BaseModel):
    """Fields of the YAML, those of SelectiveLoss (slm/integrations/loss.py)."""

    slm_select_ratio: float | dict[str, Any] | None = None
    slm_scope: str | None = None
    slm_selection: str | dict[str, Any] = "excess"
    slm_backward: str = "exact"

    @model_validator(mode="after")
    def check_selective(self) -> "SelectiveArgs":
        SelectiveLoss(self.slm_select_ratio, self.slm_scope, self.slm_selection)
        check_value("slm_backward", self.slm_backward, BACKWARD)
        check_config(self)
        return self


@dataclass
class SelectiveTrainingArgs:
    """The same, in axolotl's training arguments, whose fields all have a default."""

    slm_select_ratio: Any = None
    slm_scope: Any = None
    slm_selection: Any = "excess"
    slm_backward: Any = "exact"


def check_config(config: Any) -> None:
    """Refuse what loses scores or puts a token behind other tokens than it was scored behind."""
    for name, reason in REFUSED.items():
        value = getattr(config, name)
        if value:
            raise ValueError(f"{name} is {value!r}: it {reason}, leave SelectivePlugin or it out")
    if config.excess_length_strategy == "truncate":
        raise ValueError(
            f"excess_length_strategy is 'truncate', which cuts the tokens but not {COLUMN}; use "
            "'drop', or truncate before you score"
        )
    if config.sample_packing and not config.attn_decontaminates_packing:
        raise ValueError(
            f"sample_packing is true, but with attn_implementation {config.attn_implementation!r} "
            "packed documents see each other, unlike when they were scored; use sdpa, eager, "
            "flex_attention or a flash attention"
        )


def contents_of(sources: list[Any]) -> str:
    """A name for what the local files of these datasets hold, by their sizes and times."""
    digest = hashlib.sha256()
    for source in sources:
        root = Path(source["path"])
        for file in [root, *sorted(root.rglob("*"))]:
            if file.is_file() and not file.name.startswith(OWN_FILES):
                digest.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


# ---- the batch ----------------------------------------------------------------------------------


class PackedCollator:
    """ReferenceCollator for axolotl's collators, whose examples may be lists: one a packed row."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Mapping[str, Any]:
        if not isinstance(examples[0], list):
            return ReferenceCollator(self.collator)([with_scores(one) for one in examples])
        sizes = [len(row) for row in examples]
        flat = [with_scores(one) for row in examples for one in row]
        return ReferenceCollator(lambda ones: self.collator(grouped(ones, sizes)))(flat)


def with_scores(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """NaN for the first token, which nothing of its own stands before."""
    found = {name: scores_in(example[name]).clone() for name in BESIDE if name in example}
    for scores in found.values():
        scores[:1] = torch.nan
    return {**example, **found}


def grouped(examples: list[Any], sizes: list[int]) -> list[list[Any]]:
    rest = iter(examples)
    return [[next(rest) for _ in range(size)] for size in sizes]


# ---- the plugin ---------------------------------------------------------------------------------


class SelectivePlugin(BasePlugin):
    """`plugins: [slm.integrations.axolotl.SelectivePlugin]`."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SelectiveArgs.__name__}"

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.{SelectiveTrainingArgs.__name__}"

    def get_training_args(self, cfg: Any) -> Any:
        return {
            "slm_select_ratio": cfg.slm_select_ratio,
            "slm_scope": cfg.slm_scope,
            "slm_selection": cfg.slm_selection,
            "slm_backward": cfg.slm_backward,
            "average_tokens_across_devices": True,
        }

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Loads nothing: axolotl does, into a folder that changes when the scores do."""
        sources = [*cfg.datasets, *(cfg.test_datasets or [])]
        folder = cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH
        cfg.dataset_prepared_path = str(Path(folder) / f"scored-{contents_of(sources)}")

    def get_trainer_cls(self, cfg: Any) -> type:
        return make_trainer_class()


def make_trainer_class() -> type:
    """Made when it is asked for: axolotl reads its plugins before its trainers can be imported."""
    from axolotl.core.trainers.base import AxolotlTrainer

    check_parameters(AxolotlTrainer.__init__, ("eval_data_collator",), MADE_FOR)
    check_attributes(AxolotlTrainer, ("_get_dataloader", "_create_multipack_sampler"), MADE_FOR)

    class SelectiveAxolotlTrainer(SelectiveTrainerMixin, AxolotlTrainer):
        """AxolotlTrainer with the loss that its training arguments name."""

        def __init__(self, *, args: Any, train_dataset: Any, **kwargs: Any):
            selective = SelectiveLoss(args.slm_select_ratio, args.slm_scope, args.slm_selection)
            check_columns(train_dataset, selective.rule.needs)
            super().__init__(
                args=args,
                train_dataset=train_dataset,
                selection=selective.rule,
                backward=args.slm_backward,
                **kwargs,
            )
            if args.sample_packing:
                check_isolation(causal_lm(self.model))
            inner: Any = self.data_collator
            self.data_collator: Any = PackedCollator(inner.collator)
            evaluated: Any = self.eval_data_collator
            self.eval_data_collator = PackedCollator(evaluated)

    return SelectiveAxolotlTrainer


def check_columns(dataset: Any, needs: Sequence[str]) -> None:
    """Every rule needs COLUMN here: it keeps the first tokens of packed documents out."""
    for name in (COLUMN, *needs):
        if name not in dataset.column_names:
            raise ValueError(
                f"the prepared dataset has no {name} (it has {', '.join(dataset.column_names)}): "
                f"give axolotl one with input_ids, attention_mask, labels and {name}, and leave "
                "its type: empty"
            )


def check_isolation(model: Any) -> None:
    if next(model.parameters()).is_meta:
        return
    training = model.training
    ids = torch.arange(2 * PROBE_TOKENS, device=model.device)[None]
    check_documents(model.eval(), ids, "sample_packing", LEAK_TOLERANCE)
    model.train(training)
