"""Selective language modeling in LitGPT 0.5: stock `litgpt.pretrain` on a corpus and its scores.

B micro-batch, L sequence, V vocabulary. LitGPT has no hook: `pretrain.fit` calls the function
`chunked_cross_entropy` of its own module on what `CycleIterator` of its own module yields. These
three are replaced while `selective_pretraining` lasts; nothing else of LitGPT is touched::

    from litgpt import pretrain

    with selective_pretraining(select_ratio=0.6):  # or selection=Sigmoid(temperature=1.0)
        data = SelectiveData("corpus/train", "references", "corpus/heldout")
        pretrain.setup("pythia-160m", data=data, train=TrainArgs(max_seq_length=2048, ...))

LitGPT parses sys.argv again as it saves: `python train.py pythia-160m`, without other words. Any
other data module will do whose training batches are {"tokens": (B, L + 1) int64,
"reference_logprob": (B, L) float32}, the scores of tokens[:, 1:]: natural log, <= 0. Weights of
their losses may stand beside them as `token_weight`, (B, L), none of them 0. With `window` (B,),
the number of each row in the data, Random draws what the trainer draws. The scores travel with
their tokens from the loader to the step that trains on them, however many batches are read ahead.
Validation stays cross-entropy over every token, and so is `loss_all`, which LitGPT's loggers get
beside `loss`.

fit averages the losses of its micro-batches and ranks. That is the mean over all selected tokens
where every micro-batch selects as many as the others, which it does where every token has a score;
another number is an error.

In a training loop of your own `slm_kernels.selective_cross_entropy_from_logits(model(input_ids),
targets, -reference_logprob, select_ratio=0.6).loss` takes the place of `chunked_cross_entropy`;
`slm_kernels.selective_cross_entropy` with `model.lm_head.weight` saves the logits as well.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from litgpt import pretrain
from litgpt.data import DataModule
from litgpt.utils import CycleIterator, chunked_cross_entropy
from torch import Tensor
from torch.utils.data import DataLoader

from slm.integrations.loss import BESIDE, LOGGED, Columns, SelectiveLoss, record_of
from slm.integrations.signatures import check_attributes, check_parameters
from slm.selection import Selection
from slm.selection.books import means, named, no_sums, step_sums
from slm.store.shards import Corpus, References
from slm.store.windows import Windows
from slm_kernels.ops import refuse

MADE_FOR = "litgpt 0.5.13"
KNOWN = {"tokens", "window", *BESIDE}
check_attributes(pretrain, ("fit", "validate", "CycleIterator", "chunked_cross_entropy"), MADE_FOR)
check_parameters(
    chunked_cross_entropy, ("logits", "targets", "chunk_size", "ignore_index"), MADE_FOR
)
check_parameters(CycleIterator.__init__, ("iterable",), MADE_FOR)
check_parameters(pretrain.fit, ("fabric", "devices", "state", "train", "num_nodes"), MADE_FOR)
check_parameters(DataModule.connect, ("tokenizer", "batch_size", "max_seq_length"), MADE_FOR)

Batch = dict[str, Tensor]  # tokens (B, L + 1), scores (B, L), window and epoch (B,)


@contextmanager
def selective_pretraining(
    *,
    select_ratio: Any = None,
    scope: str | None = None,
    selection: Selection | Mapping[str, Any] | str = "excess",
) -> Iterator[None]:
    """While it lasts, `litgpt.pretrain` trains on what a rule selects of every micro-batch.

    Takes what SelectiveLoss takes. Raises ValueError for what that refuses and for scope "global".
    """
    chosen = _Selection(SelectiveLoss(select_ratio, scope, selection), pretrain.fit)
    replaced: dict[str, Any] = {
        "fit": chosen.fit,
        "CycleIterator": partial(_Batches, chosen),
        "chunked_cross_entropy": chosen.loss,
    }
    stock = {name: getattr(pretrain, name) for name in replaced}
    for name, value in replaced.items():
        setattr(pretrain, name, value)
    try:
        yield
    finally:
        for name, value in stock.items():
            setattr(pretrain, name, value)


class _Batches(CycleIterator):
    """What fit reads from: tokens for fit, all of the batch for the loss that comes next."""

    def __init__(self, selection: "_Selection", iterable: Any):
        super().__init__(iterable)
        self.selection = selection

    def __next__(self) -> Tensor:  # (B, L + 1)
        batch = super().__next__()
        needed = {"tokens", *self.selection.selective.rule.needs}
        if not isinstance(batch, dict) or not needed <= set(batch) <= KNOWN:
            found = ", ".join(batch) if isinstance(batch, dict) else type(batch).__name__
            raise ValueError(
                f"training batches must be dicts of {' and '.join(sorted(needed, reverse=True))}, "
                f"got {found}"
            )
        self.selection.batch = batch | {"epoch": torch.full((len(batch["tokens"]),), self.epoch)}
        return batch["tokens"]


class _Selection:
    def __init__(self, selective: SelectiveLoss, stock_fit: Callable[..., None]):
        selective.check_step("LitGPT", True, "its loss is divided in every micro-batch")
        if selective.rule.scope == "global":
            raise ValueError(
                "scope is 'global', under which ranks select different numbers, and LitGPT "
                "averages ranks: it must be 'batch' or 'sequence'"
            )
        self.selective, self.stock_fit = selective, stock_fit
        self.batch: Batch | None = None
        self.tokens_seen: Callable[[], int] = lambda: 0
        self.sums = no_sums(torch.device("cpu"))

    def fit(self, fabric: Any, devices: int, state: dict[str, Any], **others: Any) -> None:
        """LitGPT's, whose step and logger are known meanwhile."""
        train, num_nodes = others["train"], others.get("num_nodes", 1)
        iters = train.gradient_accumulation_iters(devices, num_nodes)
        size = train.micro_batch_size * state["model"].max_seq_length * fabric.world_size
        self.tokens_seen = lambda: state["step_count"] * iters * size
        self.sums = no_sums(fabric.device)
        log_dict = fabric.log_dict

        def log(metrics: Mapping[str, Any], step: int | None = None) -> None:
            log_dict({**metrics, **self.means(fabric)} if "loss" in metrics else metrics, step)

        fabric.log_dict = log
        try:
            self.stock_fit(fabric=fabric, devices=devices, state=state, **others)
        finally:
            fabric.log_dict = log_dict

    def means(self, fabric: Any) -> dict[str, float]:
        """Of all micro-batches and ranks since the last log; every rank calls."""
        found = means(named(fabric.all_reduce(self.sums, reduce_op="sum").tolist()))
        self.sums.zero_()
        return {name: found[name] for name in LOGGED if name in found}

    def loss(
        self,
        logits: Tensor | list[Tensor],  # (B, L, V)
        targets: Tensor,  # (B, L)
        chunk_size: int = 128,
        ignore_index: int = -100,
    ) -> Tensor:  # ()
        """In place of chunked_cross_entropy, which validation and the count of FLOPs get."""
        if not torch.is_grad_enabled() or targets.is_meta:
            return chunked_cross_entropy(logits, targets, chunk_size, ignore_index)
        assert isinstance(logits, Tensor), f"pretrain of {MADE_FOR} has its logits whole"
        (targets, columns), seen = self._read(targets), self.tokens_seen()
        count = self.selective.denominator([(targets, columns)], lambda count: count, seen)
        targets = check_count(count, targets, self.selective.rule, seen)
        out = self.selective.of_logits(logits, targets, columns, count, seen)
        self.sums = self.sums.to(targets.device) + step_sums(record_of(out, targets, columns))
        return out.loss

    def _read(
        self,
        targets: Tensor,  # (B, L)
    ) -> tuple[Tensor, Columns]:
        """The targets, which must be those of the batch that was read, and what it has of them."""
        batch, self.batch = self.batch, None
        if batch is None:
            raise ValueError("litgpt.pretrain asks for a training loss before it read a batch")
        columns = {name: value.to(targets.device) for name, value in batch.items()}
        tokens = columns.pop("tokens")[:, 1:]
        for name in ("targets", *(name for name in BESIDE if name in columns)):
            found = targets if name == "targets" else columns[name]
            if found.shape != tokens.shape:
                raise ValueError(
                    f"{name} is {tuple(found.shape)}, the targets of the batch are "
                    f"{tuple(tokens.shape)}: set train.max_seq_length to the length of the scored "
                    "windows"
                )
        others = targets != tokens
        return refuse(targets, others, targets, "targets must be those of the batch"), columns


def check_count(count: Tensor, targets: Tensor, rule: Selection, tokens_seen: int) -> Tensor:
    """ValueError, or a device assertion, unless this is divided by as much as other calls are."""
    rows, length = targets.shape
    every = torch.full((rows,), length) if rule.scope == "sequence" else torch.tensor(rows * length)
    wanted = int(rule.divisor(every, tokens_seen).sum())
    return refuse(
        targets,
        count != wanted,
        count,
        f"every micro-batch must select {wanted} of its {targets.numel()} tokens, because LitGPT "
        "averages micro-batches and ranks: give every token its scores, and no weight of 0",
    )


class _Loader(DataLoader[Any]):
    """Without a state of its own LitGPT would pickle it, data module and all, as it saves."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class SelectiveData(DataModule):
    """The windows of a corpus with their reference scores, and held-out windows for validation.

    corpus, references, heldout:  folders (`slm prepare`, `slm score`), concatenated documents
    check:                        "size", or "full" to compare every file's hash

    Raises UserError where references and corpus do not belong together, ValueError where LitGPT
    cannot train on the corpus. The order is drawn from `seed`, and starts again where LitGPT
    resumes: give another seed then.
    """

    def __init__(
        self,
        corpus: str,
        references: str,
        heldout: str,
        num_workers: int = 0,
        seed: int = 42,
        check: str = "size",
    ):
        super().__init__()
        whole = Corpus.open(corpus, check)
        self.windows = Windows(whole, [References.open(references, check)])
        self.heldout = Windows(Corpus.open(heldout, check))
        self.num_workers, self.seed, self.batch_size = num_workers, seed, 1
        for part in (whole, self.heldout.corpus):
            if part.manifest["packing"] != "concat" or part.has_masks:
                raise ValueError(
                    f"{part.folder}: LitGPT pretrains on every token of concatenated documents, "
                    f"packing is {part.manifest['packing']!r}, masks are {part.has_masks}"
                )

    def connect(
        self,
        tokenizer: Any = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        **others: Any,
    ) -> None:
        for part in (self.windows.corpus, self.heldout.corpus):
            if part.seq_len != max_seq_length:
                raise ValueError(
                    f"train.max_seq_length must be {part.seq_len}, the length of the windows of "
                    f"{part.folder}, got {max_seq_length}"
                )
        self.batch_size = batch_size

    def train_dataloader(self) -> _Loader:
        return self._loader(self.windows, self._scored, shuffle=True)

    def val_dataloader(self) -> _Loader:
        return self._loader(self.heldout, self._tokens, shuffle=False)

    def _loader(self, windows: Windows, read: Any, shuffle: bool) -> _Loader:
        return _Loader(
            range(len(windows)),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.num_workers,
            collate_fn=read,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _scored(self, numbers: list[int]) -> Batch:
        batch = self.windows.batch(np.array(numbers))
        tokens = torch.from_numpy(self.windows.tokens(np.array(numbers)))
        return {"tokens": tokens} | {name: batch[name] for name in batch.keys() & KNOWN}

    def _tokens(self, numbers: list[int]) -> Tensor:  # (B, L + 1)
        return torch.from_numpy(self.heldout.tokens(np.array(numbers)))
