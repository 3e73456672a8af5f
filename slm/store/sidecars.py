"""Shards: a sidecar each on disk, a row each of a table in memory.

A manifest may list 100,000 of them. As Python objects they are 300 MB in every process that opens
the store, and a pickle of that to each of its workers; as arrays 120 bytes a file.
"""

import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slm.errors import UserError
from slm.store.fields import COLUMN, DTYPE, DTYPES, INDEX, SHA256, check_fields, mapping
from slm.store.files import Json, Publish, read_json, write_json

SHARD = {
    "index": INDEX,
    "num_tokens": INDEX,
    "sha256": mapping(COLUMN, SHA256),
    "dtype": mapping(COLUMN, DTYPE),
    "rows": mapping(COLUMN, INDEX),
}
FILE = np.dtype([("rows", np.int64), ("dtype", np.int8), ("sha256", "S64")])  # dtype: of DTYPES


@dataclass(frozen=True)
class Shard:
    """One sidecar: a shard's number, its length and the sha256 and dtype of each of its files."""

    index: int
    num_tokens: int
    sha256: dict[str, str]  # column -> hex digest
    dtype: dict[str, str]  # column -> NumPy dtype
    rows: dict[str, int]  # column -> number of rows (num_tokens, or the number of documents)

    def path(self, folder: Path, column: str) -> Path:
        return shard_path(folder, column, self.index)


def shard_path(folder: Path, column: str, index: int, suffix: str = ".npy") -> Path:
    return folder / shard_name(column, index, suffix)


def shard_name(column: str, index: int, suffix: str = ".npy") -> str:
    return f"{column}-{index:05d}{suffix}"


def write_sidecar(folder: Path, column: str, shard: Shard, publish: Publish | None = None) -> None:
    """Mark a shard as finished; `column` is the file it is named after (tokens, logprobs)."""
    write_json(shard_path(folder, column, shard.index, ".json"), asdict(shard), publish)


def read_sidecars(folder: Path, column: str) -> list[Shard]:
    """The finished shards of a folder, in order: as numbers, for 100000 sorts before 99999."""
    paths = sorted(folder.glob(f"{column}-*.json"), key=lambda path: (len(path.name), path.name))
    return [read_shard(path, read_json(path)) for path in paths]


def read_shard(path: Path, record: Json) -> Shard:
    """`path` is where the record stands."""
    check_fields(path, record, SHARD)
    if not record["sha256"].keys() == record["dtype"].keys() == record["rows"].keys():
        raise UserError(f"{path}: sha256, dtype and rows of a shard name other columns")
    return Shard(**{name: record[name] for name in SHARD})


class Shards(Sequence[Shard]):
    """The shards that a manifest lists, 0 to n - 1.

    path:          of the manifest
    least_tokens:  that each must have
    """

    def __init__(self, path: Path, records: Sequence[Json], least_tokens: int):
        self.num_tokens = np.zeros(len(records), np.int64)
        self._files: dict[str, np.ndarray] = {}  # column -> (n,) FILE, without hash: no file
        for place, record in enumerate(records):
            self._set(place, read_shard(path, record))
        indices = [record["index"] for record in records]
        if indices != list(range(len(records))):
            raise UserError(f"{path}: its shards are numbered {reprlib.repr(indices)}")
        if (self.num_tokens < least_tokens).any():
            counts = reprlib.repr(self.num_tokens.tolist())
            raise UserError(f"{path}: num_tokens of its shards is {counts}")

    @classmethod
    def joined(cls, parts: Sequence["Shards"], columns: Callable[[str], bool]) -> "Shards":
        """Those of several stores, numbered on; of the columns that `columns` accepts."""
        made = cls.__new__(cls)
        made.num_tokens = np.concatenate([part.num_tokens for part in parts])
        made._files = {
            name: np.concatenate(
                [part._files.get(name, np.zeros(len(part), FILE)) for part in parts]
            )
            for name in sorted(set.union(*(part.names for part in parts)))
            if columns(name)
        }
        return made

    def _set(self, place: int, shard: Shard) -> None:
        self.num_tokens[place] = shard.num_tokens
        for column, digest in shard.sha256.items():
            if column not in self._files:
                self._files[column] = np.zeros(len(self.num_tokens), FILE)
            kind = DTYPES.index(shard.dtype[column])
            self._files[column][place] = shard.rows[column], kind, digest

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, index: int) -> Shard:  # type: ignore[override]
        files = {name: rows[index] for name, rows in self._files.items() if rows["sha256"][index]}
        return Shard(
            index=range(len(self))[index],
            num_tokens=int(self.num_tokens[index]),
            sha256={name: file["sha256"].decode() for name, file in files.items()},
            dtype={name: DTYPES[file["dtype"]] for name, file in files.items()},
            rows={name: int(file["rows"]) for name, file in files.items()},
        )

    @property
    def names(self) -> set[str]:
        """The columns that some shards have."""
        return {*self._files}

    @property
    def num_files(self) -> int:
        return sum(len(self.having(name)) for name in self._files)

    def having(self, column: str) -> np.ndarray:  # (m,)
        """Which shards have the column."""
        return np.flatnonzero(self._files[column]["sha256"])

    def file_names(self) -> Iterator[str]:
        """Of all shards and columns."""
        for name in self._files:
            yield from (shard_name(name, index) for index in self.having(name).tolist())
