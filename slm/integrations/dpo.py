"""DPO on the response tokens that matter, in TRL's `DPOTrainer` (made for trl 1.16).

    pairs = score_pairs(pairs_dataset("pairs.jsonl"), "runs/reference/model")
    args = DPOConfig("out", precompute_ref_log_probs=True)
    SelectiveDPOTrainer(model, args=args, train_dataset=pairs, select_ratio=0.4).train()

Of each response exactly K = clamp(floor(select_ratio * tokens + 0.5), 1, tokens) are kept, and what
TRL computes of a response's log-probability, under the model and under the reference, it computes
of the sums over these. By `selection` they are those with the highest

    excess      chosen: log p_ref - log p, the excess loss of Rho-1; rejected: log p - log p_ref
                (SDPO, arXiv 2507.07725, the alignment scores; it keeps all above a quantile, 0.6)
    confidence  - log p, on both sides: what the model is least sure of (ConfPO, arXiv 2506.08712,
                which keeps all below the response's mean, in SimPO's loss; here in TRL's)
    random      nothing: as many tokens, drawn from torch's generator. The control

and ties go to the earlier token. A reference that is the model's own copy, TRL's default, gives
nothing but ties at the first step: SDPO takes a better one. The choice has no gradient. With
select_ratio=1 every number is TRL's.

Pairs are TRL's (text, chats) or token ids (slm.integrations.datasets.pairs_dataset), which stock
DPOTrainer does not take: it tokenizes, and puts an EOS after every response that is text. Log-probs
of the reference come from it or, with precompute_ref_log_probs=True, from two columns of the pairs,
made by slm.integrations.datasets.score_pairs, and no reference is loaded.

What TRL logs (rewards, log-probs, accuracies) stays that of whole responses; `loss_all` is the loss
of these, comparable across select ratios, `kept_frac/chosen` and `/rejected` the shares that were
kept and `kept_tokens` their number since the last log. Evaluation is TRL's own, over every token.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer

from slm.checks import check_value, real, word
from slm.integrations.collator import IDS, REFERENCES, SIDES, PairCollator
from slm.integrations.loss import COLUMN
from slm.integrations.signatures import check_attributes, check_parameters
from slm.integrations.transformers import check_trainer, names_of
from slm_kernels import select_top_k

MADE_FOR = "trl 1.16"
check_parameters(DPOTrainer._compute_loss, ("model", "inputs", "return_outputs"), MADE_FOR)
check_parameters(DPOTrainer.compute_ref_log_probs, ("model", "inputs"), MADE_FOR)
check_parameters(
    DPOTrainer._prepare_dataset, ("dataset", "processing_class", "args", "dataset_name"), MADE_FOR
)
check_parameters(DPOTrainer._precompute_ref_logps, ("dataset", "name", "batch_size"), MADE_FOR)
check_attributes(DPOTrainer, ("_set_signature_columns_if_needed", "log"), MADE_FOR)

SELECTION = word("excess", "confidence", "random")
# These divide by a response's tokens or look at each of them, and so not at sums alone.
BY_TOKENS = ("ipo", "sigmoid_norm", "sft")
SUMS = ("ref_chosen_logps", "ref_rejected_logps")


class SelectiveDPOTrainer(DPOTrainer):
    """`DPOTrainer(..., select_ratio=, selection="excess" | "confidence" | "random")`."""

    def __init__(self, *args: Any, select_ratio: float, selection: str = "excess", **kwargs: Any):
        check_value("select_ratio", select_ratio, real(0, 1, "(]"))
        check_value("selection", selection, SELECTION)
        self.select_ratio, self.selection = select_ratio, selection
        super().__init__(*args, **kwargs)
        check_trainer(self)
        check_arguments(self.args)
        self.precompute_ref_logps = True  # sums are given to every batch, whoever computed them
        self.data_collator = PairCollator(self.data_collator)
        self._kept = torch.zeros(4, dtype=torch.int64, device=self.args.device)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Token ids as they are; texts and chats as TRL tokenizes them."""
        names = names_of(dataset)
        check_references(names, args, f"{dataset_name} dataset")
        if not {*IDS} <= {*names}:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return dataset
        return dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)  # as TRL

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        columns += [name for name in REFERENCES if name not in columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset  # sums over whole responses are of no use; columns are there, or a model

    def _compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool
    ) -> Any:
        """In training of the tokens that are kept; what TRL logs and evaluates is of all."""
        batch: dict[str, Any] = dict(inputs)
        reference = self._reference(batch)
        response = batch["completion_mask"][:, 1:].bool()
        whole = batch | sums_of(reference, response)
        trl: Any = super()
        if not model.training:
            return trl._compute_loss(model, whole, return_outputs)
        forward = Once(model)
        loss_all = trl._compute_loss(forward, whole, False)
        outputs = forward.outputs
        log_probs = outputs.log_probs[:, -response.shape[1] :]  # behind virtual tokens of a prompt
        kept = self._choose(log_probs.detach(), reference, response)
        self._count(kept, response, loss_all.detach())
        forward.outputs = replace(outputs, log_probs=log_probs.masked_fill(~kept, 0))
        with self._unlogged():
            return trl._compute_loss(forward, batch | sums_of(reference, kept), False)

    def _reference(self, batch: dict[str, Any]) -> Tensor:  # (2B, T - 1)
        """Log-probs of the next tokens, 0 where there is no response; takes the column out."""
        if COLUMN in batch:
            return batch.pop(COLUMN)[:, 1:]
        forward = Once(self.ref_model or self.model)
        self.compute_ref_log_probs(forward, batch)  # who disables adapters and checkpointing
        return forward.outputs.log_probs[:, 1 - batch["input_ids"].shape[1] :]

    def _choose(
        self, log_probs: Tensor, reference: Tensor, response: Tensor
    ) -> Tensor:  # (2B, T - 1) each -> bool
        if self.selection == "random":
            scores = torch.rand_like(reference, dtype=torch.float32)
        elif self.selection == "confidence":
            scores = -log_probs
        else:
            chosen, rejected = (reference - log_probs).chunk(2)
            scores = torch.cat([chosen, -rejected])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return select_top_k(scores, response, self.select_ratio, scope="sequence")

    def _count(self, kept: Tensor, response: Tensor, loss_all: Tensor) -> None:
        sides = [*kept.chunk(2), *response.chunk(2)]
        self._kept += torch.stack([side.sum() for side in sides])
        mean = self.accelerator.gather(loss_all).mean().item()
        self._metrics["train"]["loss_all"].append(mean)

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """For a second look at a batch, whose metrics and tokens are counted."""
        kept = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        yield
        self._metrics, self._total_train_tokens = kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            counts: Any = self.accelerator.reduce(self._kept, "sum")
            kept, tokens = counts.view(2, 2).tolist()
            for name, some, of in zip(SIDES, kept, tokens, strict=True):
                logs[f"kept_frac/{name}"] = some / max(1, of)
            logs["kept_tokens"] = sum(kept)
            self._kept.zero_()
        super().log(logs, start_time)


class Once:
    """A model whose forward pass runs once; asked again, it gives what `outputs` is then."""

    def __init__(self, model: Any):
        self.model = model
        self.outputs: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        if self.outputs is None:
            self.outputs = self.model(**kwargs)
        return self.outputs


def sums_of(reference: Tensor, kept: Tensor) -> dict[str, Tensor]:  # (2B, T - 1) each -> (B,) each
    """As a batch of DPOTrainer has them, of the tokens that are kept."""
    return dict(zip(SUMS, reference.masked_fill(~kept, 0).sum(1).chunk(2), strict=True))


# ---- refusal ------------------------------------------------------------------------------------


def check_references(names: list[str], args: Any, which: str) -> None:
    """Log-probs of the reference come from columns or from a model: the arguments say which."""
    missing = [name for name in (*IDS, *REFERENCES) if name not in names]
    if args.precompute_ref_log_probs and missing:
        raise ValueError(
            f"precompute_ref_log_probs is True, but the {which} has no {missing[0]} (it has "
            f"{', '.join(names)}): slm.integrations.datasets.score_pairs makes it, token by token"
        )
    if not args.precompute_ref_log_probs and {*REFERENCES} & {*names}:
        raise ValueError(
            f"the {which} has {REFERENCES[0]}, but precompute_ref_log_probs is False, so that a "
            "reference model would be loaded in its place: set it to True, or remove the columns"
        )
    if args.precompute_ref_log_probs and args.truncation_mode != "keep_start":
        raise ValueError(
            f"truncation_mode is {args.truncation_mode!r}, which cuts off what tokens were scored "
            'behind; use "keep_start"'
        )


def check_arguments(args: Any) -> None:
    """Refuse losses that are none of sums over the tokens that are kept."""
    for name in args.loss_type:
        if name in BY_TOKENS:
            raise ValueError(
                f"loss_type is {name!r}, which counts every token of a response, kept or not"
            )
    for name, value in (("use_weighting", args.use_weighting), ("ld_alpha", args.ld_alpha)):
        if value not in (None, False):
            raise ValueError(
                f"{name} is {value}, which weighs every token of a response, kept or not"
            )
