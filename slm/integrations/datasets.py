"""Hugging Face `datasets` and our folders: there, back, and a score column for your own data.

    to_hf_dataset(corpus, references)         folders -> one row a window
    WindowDataset(corpus, references)         folders -> a torch dataset of shifted windows
    from_hf_dataset(dataset, out, tokenizer)  rows of one length -> folders that `slm train` takes
    score_dataset(dataset, model)             your token lists -> the same with `reference_logprob`

A row is not shifted: `labels[i]` and `reference_logprob[i]` are about the token `input_ids[i]`;
-100 and NaN say that it is no target, has no score. `seq_lengths`, as TRL's packing writes it, are
the lengths of the documents in a row, which neither attend to nor predict each other.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from slm.data import IGNORE_INDEX, Windows, open_references
from slm.errors import UserError
from slm.integrations.dataset_corpus import from_hf_dataset
from slm.integrations.dataset_rows import COLUMN
from slm.integrations.dataset_scores import score_dataset
from slm.integrations.signatures import check_parameters
from slm.shards import Corpus, hash_json

__all__ = ["WindowDataset", "from_hf_dataset", "score_dataset", "to_hf_dataset"]

NEEDED = ("features", "gen_kwargs", "fingerprint")
check_parameters(Dataset.from_generator, NEEDED, "datasets 4.3 to 5.2")

WINDOWS_AT_ONCE = 256
TOKENS_AT_WRITING = 1 << 18  # `datasets` holds about 100 bytes for each
Folders = str | Path | Sequence[str | Path]


def open_windows(corpus: str | Path, references: Folders | None, combine: str | None) -> Windows:
    """combine: what becomes of several references: mean, min, max or mixture (slm.data)."""
    named = [references] if isinstance(references, str | Path) else references or []
    stores = open_references([str(folder) for folder in named], combine, "size", prefix="")
    return Windows(Corpus.open(corpus), stores, combine)


class WindowDataset(torch.utils.data.Dataset):
    """Item w is window w, shifted as in slm.data: ``input_ids``, ``targets`` (T,) int64 and, where
    there are any, ``reference_logprob`` (T,) float32 and ``position_ids`` (T,) int64.

    default_collate stacks items; workers of a DataLoader map the files themselves.
    """

    NAMES = ("input_ids", "targets", COLUMN, "position_ids")

    def __init__(
        self, corpus: str | Path, references: Folders | None = None, combine: str | None = None
    ):
        self.windows = open_windows(corpus, references, combine)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        batch = self.windows.batch(np.array([index]))
        return {name: batch[name][0] for name in self.NAMES if name in batch}


def to_hf_dataset(
    corpus: str | Path, references: Folders | None = None, *, combine: str | None = None
) -> Dataset:
    """One row a window, in order, cached by `datasets` under the fingerprints of the folders.

    input_ids          T + 1 tokens, so that all T targets are there
    labels             the same tokens; -100: no target (the row's first, prompts, and with
                       packing=documents the first token of a document)
    reference_logprob  with references: NaN exactly where labels is -100
    seq_lengths        with packing=documents: lengths of the documents in the row
    """
    windows = open_windows(corpus, references, combine)
    try:
        return Dataset.from_generator(
            window_rows,
            features=row_features(windows),
            gen_kwargs={"windows": windows},
            writer_batch_size=max(1, TOKENS_AT_WRITING // windows.corpus.seq_len),
            fingerprint=identity(windows),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def identity(windows: Windows) -> str:
    """What the rows depend on."""
    stores = [store.fingerprint for store in windows.references]
    return hash_json([windows.corpus.fingerprint, stores, windows.combine])


def has_documents(windows: Windows) -> bool:
    return windows.corpus.manifest["packing"] == "documents"


def row_features(windows: Windows) -> Features:
    columns = {"input_ids": List(Value("int32")), "labels": List(Value("int64"))}
    if windows.references:
        columns[COLUMN] = List(Value("float32"))
    if has_documents(windows):
        columns["seq_lengths"] = List(Value("int32"))
    return Features(columns)


def window_rows(windows: Windows) -> Iterator[dict[str, Any]]:
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        numbers = np.arange(start, min(start + WINDOWS_AT_ONCE, len(windows)))
        columns = unshifted(windows, numbers)
        if has_documents(windows):
            first = windows.document_starts(numbers)
            columns["seq_lengths"] = [document_lengths(row) for row in first]
        yield from (
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        )


def unshifted(windows: Windows, numbers: np.ndarray) -> dict[str, Any]:  # (B, T + 1) each
    batch, ids = windows.batch(numbers), windows.tokens(numbers)
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[:, 1:] = batch["targets"].numpy()
    columns: dict[str, Any] = {"input_ids": ids.astype(np.int32), "labels": labels}
    if windows.references:
        scores = np.full(ids.shape, np.nan, np.float32)
        scores[:, 1:] = batch[COLUMN].numpy()
        columns[COLUMN] = np.where(labels == IGNORE_INDEX, np.float32(np.nan), scores)
    return columns


def document_lengths(first: np.ndarray) -> np.ndarray:  # (T + 1,) bool -> (documents,)
    """A document that began in an earlier window begins anew with the row."""
    return np.diff(np.flatnonzero(np.concatenate([[True], first[1:], [True]])))
