"""A side of a corpus: the token stream cut into windows and full shards."""

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slm.store.files import ArrayWriter, atomic_file
from slm.store.shards import BY_NEED
from slm.store.sidecars import Shard, shard_path, write_sidecar


class Dtypes(Protocol):
    """Of tokens and of their bytes: an encoder's, or those of a corpus that is copied."""

    @property
    def token_dtype(self) -> str: ...

    @property
    def bytes_dtype(self) -> str: ...


def column_dtypes(state: Dtypes, by_need: Collection[str]) -> dict[str, str]:
    """Of the columns of tokens; by_need: columns of slm.store.shards.BY_NEED"""
    dtypes = {"tokens": state.token_dtype, "bytes": state.bytes_dtype}
    return dtypes | {name: dtype for name, dtype in BY_NEED.items() if name in by_need}


class ShardWriter:
    """One side of the corpus: appends documents, writes whole windows, closes full shards.

    What fills no window yet stays in memory; at the end it is the tail that is dropped.
    """

    def __init__(
        self,
        folder: Path,
        seq_len: int,
        shard_tokens: int,
        state: Dtypes,
        by_need: Collection[str] = (),
    ):
        self.folder, self.seq_len = folder, seq_len
        self.capacity = max(1, (shard_tokens - 1) // seq_len) * seq_len + 1
        self.dtypes = column_dtypes(state, by_need)
        # Not written yet, as `rows` are not: start in the side, source, record.
        self.columns = {name: np.empty(0, dtype) for name, dtype in self.dtypes.items()}
        self.dtypes["documents"] = "int64"
        self.rows = np.empty((0, 3), np.int64)
        self.last_row = self.rows  # the last one written
        self.position = 0  # of the first token that is not written, in the side
        self.shard_start, self.num_shards = 0, 0
        self.end: int | None = None  # no shard of this number or above
        self.stack, self.writers = ExitStack(), {}

    def begin_at(self, number: int, start: int) -> None:
        """Write that shard alone, whose first token is `start` of the side: the first one added."""
        self.num_shards, self.end = number, number + 1
        self.position = self.shard_start = start

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    @property
    def num_pending(self) -> int:
        """Tokens that are not written yet."""
        return len(self.columns["tokens"])

    def add(self, columns: dict[str, np.ndarray], documents: np.ndarray, carried: int = 0) -> None:
        """documents (d, 3): number of tokens, source, record; no columns: nothing.

        carried: so many of the tokens, the first ones, are of the document before; -n: the first
            document has n tokens more, before these.
        """
        if not columns:
            return
        ends = self.position + self.num_pending + carried + np.cumsum(documents[:, 0])
        rows = np.column_stack([ends - documents[:, 0], documents[:, 1:]])
        for name, pending in self.columns.items():
            self.columns[name] = np.concatenate([pending, columns[name]])
        self.rows = np.concatenate([self.rows, rows])
        while self.write_windows():
            pass

    def write_windows(self) -> bool:
        """Write as many whole windows as there are into the present shard; False if none."""
        if self.num_shards == self.end:
            return False
        written = self.position - self.shard_start
        available = min(self.capacity, written + self.num_pending)
        target = (available - 1) // self.seq_len * self.seq_len + 1
        count = target - written
        if target <= 1 or count <= 0:
            return False
        if not self.writers:
            self.open_shard()
        for name, pending in self.columns.items():
            self.writers[name].append(pending[:count])
            self.columns[name] = pending[count:]
        self.position += count
        self.write_rows(int(np.searchsorted(self.rows[:, 0], self.position)))
        if target == self.capacity:
            self.close_shard()
        return True

    def write_rows(self, count: int) -> None:
        rows, self.rows = self.rows[:count], self.rows[count:]
        if len(rows):
            self.last_row = rows[-1:]
        start = rows[:, 0] - self.shard_start
        self.writers["documents"].append(
            np.column_stack([start, rows[:, 1:], np.maximum(0, -start)])
        )

    def open_shard(self) -> None:
        for column, dtype in self.dtypes.items():
            path = shard_path(self.folder, column, self.num_shards)
            file = self.stack.enter_context(atomic_file(path))
            columns = 4 if column == "documents" else None
            self.writers[column] = ArrayWriter(file, dtype, columns)
        begins = len(self.rows) > 0 and self.rows[0, 0] == self.shard_start
        if not begins:
            self.rows = np.concatenate([self.last_row, self.rows])

    def close_shard(self) -> None:
        sha256 = {column: writer.finish() for column, writer in self.writers.items()}
        rows = {column: writer.length for column, writer in self.writers.items()}
        self.stack.close()
        shard = Shard(self.num_shards, rows["tokens"], sha256, self.dtypes, rows)
        write_sidecar(self.folder, "tokens", shard)
        self.shard_start = self.position
        self.num_shards += 1
        self.writers = {}

    def finish(self) -> int:
        """Close the last shard; returns the number of tokens that filled no window."""
        if self.writers:
            self.close_shard()
        return self.num_pending
