"""Selective language modeling in LitGPT 0.5: stock `litgpt.pretrain` on a corpus and its scores.

B micro-batch, L sequence, V vocabulary. LitGPT has no hook: `pretrain.fit` calls the function
`chunked_cross_entropy` of its own module on what `CycleIterator` of its own module yields. Both are
replaced while `selective_pretraining` lasts; nothing else of LitGPT is touched::

    from litgpt import pretrain

    with selective_pretraining(select_ratio=0.6):
        data = SelectiveData("corpus/train", "references", "corpus/heldout")
        pretrain.setup("pythia-160m", data=data, train=TrainArgs(max_seq_length=2048, ...))

LitGPT parses sys.argv again as it saves: `python train.py pythia-160m`, without other words. Any
other data module will do whose training batches are {"tokens": (B, L + 1) int64,
"reference_logprob": (B, L) float32}, the scores of tokens[:, 1:]: natural log, <= 0. The scores
travel with their tokens from the loader to the step that trains on them, however many batches are
read ahead. Validation stays cross-entropy over every token.

fit averages the losses of its micro-batches and ranks. That is the mean over all selected tokens
where every micro-batch selects as many as the others, which it does where every token has a score;
another number is an error.

In a training loop of your own `slm_kernels.selective_cross_entropy_from_logits(model(input_ids),
targets, -reference_logprob, select_ratio=0.6).loss` takes the place of `chunked_cross_entropy`;
`slm_kernels.selective_cross_entropy` with `model.lm_head.weight` saves the logits as well.
"""

from collections.abc import Iterator
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

from slm.integrations.signatures import check_attributes, check_parameters
from slm.store.shards import Corpus, References
from slm.store.windows import Windows
from slm_kernels import max_selected, selective_cross_entropy_from_logits
from slm_kernels.ops import refuse
from slm_kernels.selection import check_select_ratio

MADE_FOR = "litgpt 0.5.13"
SCOPES = ("batch", "sequence")
check_attributes(pretrain, ("fit", "validate", "CycleIterator", "chunked_cross_entropy"), MADE_FOR)
check_parameters(
    chunked_cross_entropy, ("logits", "targets", "chunk_size", "ignore_index"), MADE_FOR
)
check_parameters(CycleIterator.__init__, ("iterable",), MADE_FOR)
check_parameters(DataModule.connect, ("tokenizer", "batch_size", "max_seq_length"), MADE_FOR)

Batch = dict[str, Tensor]  # tokens (B, L + 1), reference_logprob (B, L)


@contextmanager
def selective_pretraining(*, select_ratio: float, scope: str = "batch") -> Iterator[None]:
    """While it lasts, `litgpt.pretrain` trains on the selected tokens of every micro-batch.

    Raises ValueError for a select_ratio outside (0, 1] and a scope other than "batch" (of a
    micro-batch) and "sequence".
    """
    selection = _Selection(select_ratio, scope)
    stock: dict[str, Any] = {
        name: getattr(pretrain, name) for name in ("CycleIterator", "chunked_cross_entropy")
    }
    pretrain.CycleIterator = partial(_Batches, selection)  # type: ignore[misc, assignment]
    pretrain.chunked_cross_entropy = selection.loss
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
        if not isinstance(batch, dict) or set(batch) != {"tokens", "reference_logprob"}:
            found = ", ".join(batch) if isinstance(batch, dict) else type(batch).__name__
            raise ValueError(
                f"training batches must be dicts of tokens and reference_logprob, got {found}"
            )
        self.selection.batch = batch
        return batch["tokens"]


class _Selection:
    def __init__(self, select_ratio: float, scope: str):
        check_select_ratio(select_ratio)
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
        self.select_ratio, self.scope = select_ratio, scope
        self.batch: Batch | None = None

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
        out = selective_cross_entropy_from_logits(
            logits,
            targets,
            self._reference_loss(targets),
            select_ratio=self.select_ratio,
            scope=self.scope,
            ignore_index=ignore_index,
        )
        check_count(out.num_selected, targets.shape, self.select_ratio, self.scope)
        return out.loss

    def _reference_loss(
        self,
        targets: Tensor,  # (B, L)
    ) -> Tensor:  # (B, L)
        batch, self.batch = self.batch, None
        if batch is None:
            raise ValueError("litgpt.pretrain asks for a training loss before it read a batch")
        tokens, logprob = batch["tokens"][:, 1:], batch["reference_logprob"]
        if not tokens.shape == logprob.shape == targets.shape:
            raise ValueError(
                f"targets are {tuple(targets.shape)}, those of the batch {tuple(tokens.shape)} and "
                f"its reference_logprob {tuple(logprob.shape)}: set train.max_seq_length to the "
                "length of the scored windows"
            )
        logprob = refuse(logprob, logprob > 0, logprob, "reference_logprob must be <= 0")
        return -refuse(logprob, targets != tokens, targets, "targets must be those of the batch")


def check_count(num_selected: Tensor, shape: torch.Size, select_ratio: float, scope: str) -> None:
    """ValueError, or a device assertion, unless as many tokens were selected as in other calls."""
    wanted = max_selected(shape, select_ratio, scope)
    refuse(
        num_selected,
        num_selected != wanted,
        num_selected,
        f"every micro-batch must select {wanted} of its {shape.numel()} tokens, because LitGPT "
        "averages micro-batches and ranks: give every token a reference_logprob",
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
        tokens = torch.cat([batch["input_ids"][:, :1], batch["targets"]], dim=1)
        return {"tokens": tokens, "reference_logprob": batch["reference_logprob"]}

    def _tokens(self, numbers: list[int]) -> Tensor:  # (B, L + 1)
        return torch.from_numpy(self.heldout.tokens(np.array(numbers)))
