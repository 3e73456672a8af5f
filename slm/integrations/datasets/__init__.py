"""Hugging Face `datasets` and our folders: there, back, and a score column for your own data.

    to_hf_dataset(corpus, references)         folders -> one row a window
    WindowDataset(corpus, references)         folders -> a torch dataset of shifted windows
    from_hf_dataset(dataset, out, tokenizer)  rows of one length -> folders that `slm train` takes
    score_dataset(dataset, model)             your token lists -> the same with `reference_logprob`
    pairs_dataset(path)                       pairs of `slm pivots` -> columns of token ids for DPO
    score_pairs(pairs, model)                 pairs -> the same with log-probs of a reference

A row is not shifted: `labels[i]` and `reference_logprob[i]` are about the token `input_ids[i]`;
-100 and NaN say that it is no target, has no score. `seq_lengths`, as TRL's packing writes it, are
the lengths of the documents in a row, which neither attend to nor predict each other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from slm.errors import UserError
from slm.integrations.datasets.corpus import from_hf_dataset
from slm.integrations.datasets.pairs import pairs_dataset, score_pairs
from slm.integrations.datasets.scores import score_dataset
from slm.integrations.datasets.windows import WindowRows
from slm.stage import plain
from slm.store.files import hash_json
from slm.store.shards import Corpus
from slm.store.windows import WEIGHT, Windows, open_windows

__all__ = [
    "WindowDataset",
    "from_hf_dataset",
    "pairs_dataset",
    "score_dataset",
    "score_pairs",
    "to_hf_dataset",
]

Folders = str | Path | Sequence[str | Path] | Mapping[str, str | Path]  # the last by source


def windows_of(corpus: str | Path, references: Folders | None, combine: str | None) -> Windows:
    """combine: what becomes of several references: mean, min, max or mixture."""
    return open_windows(Corpus.open(corpus), plain(references), combine, prefix="")


class WindowDataset(torch.utils.data.Dataset):
    """Item w is window w, shifted as in Windows: ``input_ids``, ``targets`` (T,) int64 and, where
    there are any, ``reference_logprob`` (T,) float32, the references' other columns
    (slm.store.columns), of a corpus with weights ``token_weight`` (T,) float32, and by need
    ``position_ids`` (T,) int64.

    default_collate stacks items; workers of a DataLoader map the files themselves. With
    packing=documents a model of transformers must be called like this, in your own loop:

        model(input_ids=..., position_ids=..., use_cache=False)  # and no attention_mask

    With a cache, its default, or with a mask it reads over the documents' borders without a word.
    """

    def __init__(
        self, corpus: str | Path, references: Folders | None = None, combine: str | None = None
    ):
        self.windows = windows_of(corpus, references, combine)
        scores = [column.key for column in self.windows.columns]
        self.names = ("input_ids", "targets", *scores, WEIGHT, "position_ids")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        batch = self.windows.batch(np.array([index]))
        return {name: batch[name][0] for name in self.names if name in batch}


def to_hf_dataset(
    corpus: str | Path, references: Folders | None = None, *, combine: str | None = None
) -> Dataset:
    """One row a window, in order, cached by `datasets` under the fingerprints of the folders.

    input_ids          T + 1 tokens, so that all T targets are there
    labels             the same tokens; -100: no target (the row's first, prompts, and with
                       packing=documents the first token of a document)
    reference_logprob  with references: NaN exactly where labels is -100; so are their other columns
    token_weight       of a corpus with weights: what the tokens' losses are multiplied by
    seq_lengths        with packing=documents: lengths of the documents in the row
    """
    windows = windows_of(corpus, references, combine)
    builder = WindowRows(config_id=identity(windows), windows=windows)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    made: Any = builder.as_dataset(split="train")
    return made


def identity(windows: Windows) -> str:
    """What the rows depend on."""
    stores = [store.fingerprint for store in windows.references]
    columns = [column.key for column in windows.columns]
    return hash_json([windows.corpus.fingerprint, stores, windows.combine, columns])
