"""Windows as rows of a Hugging Face dataset: what `to_hf_dataset` has `datasets` build.

A file of its own, without paths: `datasets` puts its own `Path`, `open` and `os` into the module of
a builder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    DatasetBuilder,
    DatasetInfo,
    Features,
    List,
    SplitGenerator,
    Value,
)

from slm.integrations.signatures import check_attributes, check_parameters
from slm.store.columns import DTYPE
from slm.store.windows import IGNORE_INDEX, WEIGHT, Windows

MADE_FOR = "datasets 5.2"
check_parameters(DatasetBuilder.__init__, ("config_id", "config_kwargs"), MADE_FOR)
check_attributes(ArrowBasedBuilder, ("_info", "_split_generators", "_generate_tables"), MADE_FOR)

WINDOWS_AT_ONCE = 256


@dataclass
class WindowsConfig(BuilderConfig):
    windows: Any = None  # always given; a field after others that have a default needs one


class WindowRows(ArrowBasedBuilder):
    """How `datasets` makes a dataset of Arrow tables, with its bar, into its cache."""

    BUILDER_CONFIG_CLASS = WindowsConfig

    @property
    def windows(self) -> Windows:
        config: Any = self.config
        return config.windows

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=row_features(self.windows))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator("train")]

    def _generate_tables(self, **kwargs: Any) -> Iterator[tuple[Any, pa.Table]]:
        for start in range(0, len(self.windows), WINDOWS_AT_ONCE):
            numbers = np.arange(start, min(start + WINDOWS_AT_ONCE, len(self.windows)))
            yield start, window_table(self.windows, numbers)


def has_documents(windows: Windows) -> bool:
    return windows.corpus.manifest["packing"] == "documents"


def row_features(windows: Windows) -> Features:
    columns = {"input_ids": List(Value("int32")), "labels": List(Value("int64"))}
    columns |= {column.key: List(Value(DTYPE)) for column in windows.columns}
    if windows.corpus.has_weights:
        columns[WEIGHT] = List(Value(DTYPE))
    if has_documents(windows):
        columns["seq_lengths"] = List(Value("int32"))
    return Features(columns)


def window_table(windows: Windows, numbers: np.ndarray) -> pa.Table:
    columns = {name: lists(list(rows)) for name, rows in unshifted(windows, numbers).items()}
    if has_documents(windows):
        first = windows.document_starts(numbers)
        columns["seq_lengths"] = lists([document_lengths(row) for row in first])
    return pa.table(columns)


def lists(rows: list[np.ndarray]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(rows)))


def unshifted(windows: Windows, numbers: np.ndarray) -> dict[str, np.ndarray]:  # (B, T + 1)
    batch, ids = windows.batch(numbers), windows.tokens(numbers)
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[:, 1:] = batch["targets"].numpy()
    columns = {"input_ids": ids.astype(np.int32), "labels": labels}
    for column in windows.columns:
        scores = np.full(ids.shape, np.nan, DTYPE)
        scores[:, 1:] = batch[column.key].numpy()
        columns[column.key] = np.where(labels == IGNORE_INDEX, np.float32(np.nan), scores)
    if windows.corpus.has_weights:
        columns[WEIGHT] = np.ones(ids.shape, DTYPE)  # the row's first is no target
        columns[WEIGHT][:, 1:] = batch[WEIGHT].numpy()
    return columns


def document_lengths(first: np.ndarray) -> np.ndarray:  # (T + 1,) bool -> (documents,)
    """A document that began in an earlier window begins anew with the row."""
    return np.diff(np.flatnonzero(np.concatenate([[True], first[1:], [True]]))).astype(np.int32)
