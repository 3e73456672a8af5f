"""Rows of a tokenized Hugging Face dataset, read as arrays and checked, many at once.

A row may be several documents, by `seq_lengths` (as TRL's packing writes it) or by `position_ids`
that begin again at 0. What is wrong is named by its row and place.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from slm.store.columns import COLUMNS
from slm.store.shards import WEIGHT
from slm.store.windows import IGNORE_INDEX, positions


class Rows(NamedTuple):
    """r rows of a dataset, end to end: n tokens."""

    number: int  # of the first row
    lengths: np.ndarray  # (r,) tokens
    ids: np.ndarray  # (n,) int64
    first: np.ndarray  # (n,) bool: the first token of a document

    @property
    def starts(self) -> np.ndarray:  # (r,)
        return np.cumsum(self.lengths) - self.lengths

    def place(self, column: str, index: int) -> str:
        """Where entry `index` of the n stands, for messages."""
        row = int(np.searchsorted(np.cumsum(self.lengths), index, side="right"))
        return f"row {self.number + row}: {column}[{index - self.starts[row]}]"


def check_dataset(dataset: Any) -> Dataset:
    """The same rows as Arrow tables."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"a datasets.Dataset is needed, found {type(dataset).__name__}")
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"the dataset has no input_ids, it has {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the dataset has 0 rows")
    return dataset.with_format("arrow")


def flat(table: pa.Table, column: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths (r,) of a list column and its entries (n,), float32 or int64; null is NaN."""
    found: Any = table.column(column).combine_chunks()
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(found.type) for kind in kinds):
        raise ValueError(f"column {column} holds {found.type}, a list of numbers is needed")
    if found.null_count:
        row = number + found.is_null().to_pylist().index(True)
        raise ValueError(f"row {row}: {column} is null, a list is needed")
    lengths = found.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    values = found.flatten()
    if column in {WEIGHT, *(known.key for known in COLUMNS.values())}:
        return lengths, values.cast(pa.float32()).to_numpy(zero_copy_only=False)
    whole = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    if values.null_count or not whole:
        raise ValueError(
            f"column {column} holds {values.type}, {values.null_count} of them null in the rows "
            f"from {number} on; whole numbers are needed"
        )
    return lengths, values.to_numpy(zero_copy_only=False).astype(np.int64)


def read_rows(table: pa.Table, number: int, vocab_size: int) -> Rows:
    lengths, ids = flat(table, "input_ids", number)
    rows = Rows(number, lengths, ids, np.zeros(len(ids), bool))
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        at = outside[0]
        raise ValueError(
            f"{rows.place('input_ids', at)} is {ids[at]}, the vocabulary has {vocab_size}"
        )
    rows.first[rows.starts[lengths > 0]] = True
    mark_documents(table, rows)
    if "attention_mask" in table.column_names:
        check_unpadded(rows, beside(table, "attention_mask", rows))
    return rows


def check_unpadded(rows: Rows, attended: np.ndarray) -> None:  # (n,)
    """Padding would be scored, or trained after, as if it were text."""
    padding = np.flatnonzero(attended == 0)
    if len(padding):
        raise ValueError(
            f"{rows.place('attention_mask', padding[0])} is 0, 1 is expected: rows without padding"
        )


def beside(table: pa.Table, column: str, rows: Rows) -> np.ndarray:  # (n,)
    """A column with an entry for each token."""
    lengths, values = flat(table, column, rows.number)
    wrong = np.flatnonzero(lengths != rows.lengths)
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"row {rows.number + row}: {column} has {lengths[row]} entries, input_ids has "
            f"{rows.lengths[row]}"
        )
    return values


def mark_documents(table: pa.Table, rows: Rows) -> None:
    """By `seq_lengths`, else by the zeros of `position_ids`; where both are, they must agree."""
    names = table.column_names
    if "seq_lengths" in names:
        mark_lengths(*flat(table, "seq_lengths", rows.number), rows)
    if "position_ids" not in names:
        return
    found = beside(table, "position_ids", rows)
    if "seq_lengths" not in names:
        rows.first[found == 0] = True
    wrong = np.flatnonzero(found != positions(rows.first[None])[0])
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"{rows.place('position_ids', at)} is {found[at]}, "
            f"{positions(rows.first[None])[0, at]} is expected: they count from 0 in each document"
        )


def mark_lengths(counts: np.ndarray, sizes: np.ndarray, rows: Rows) -> None:
    """counts (r,): documents of each row; sizes: tokens of each document."""
    owner = np.repeat(np.arange(len(counts)), counts)
    sums = np.zeros(len(counts), np.int64)
    np.add.at(sums, owner, sizes)
    wrong = sums != rows.lengths
    wrong[owner[sizes < 1]] = True
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {rows.number + row}: seq_lengths is {sizes[owner == row].tolist()}, positive "
            f"numbers that add up to the row's {rows.lengths[row]} tokens are needed"
        )
    rows.first[np.cumsum(sizes) - sizes] = True


def check_labels(rows: Rows, labels: np.ndarray) -> np.ndarray:  # (n,) -> (n,) bool
    """True where the token is a target."""
    live = labels != IGNORE_INDEX
    wrong = np.flatnonzero(live & (labels != rows.ids))
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"{rows.place('labels', at)} is {labels[at]}, input_ids there is {rows.ids[at]}: a "
            f"label is its token or {IGNORE_INDEX}"
        )
    return live
