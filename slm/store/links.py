"""A corpus whose tokens stay in another trainer's files: `slm import link=true`.

links.json beside the manifest says of each linked column of a shard (tokens, by need masks) in
which file it lies and where: raw little-endian numbers, one after the other. The sidecar's sha256
is of these bytes, so they belong to the fingerprint, and the paths do not. `bytes` is no file at
all: a token stands for as many as the row of its id in token_bytes.npy says.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.store.fields import FILE, INDEX, OBJECT, SHA256, SIZE, TEXT, check_fields, mapping
from slm.store.files import Advance, check_hash, check_regular, map_array, nothing, read_json

RECORD, TABLE, MANIFEST = "links.json", "token_bytes.npy", "manifest.json"
BLOCK = 1 << 22
PLACE = {"path": TEXT, "offset": INDEX, "size": SIZE}
LINKS = {"files": mapping(FILE, OBJECT), "ids": SIZE, "bytes_dtype": TEXT, "token_bytes": SHA256}


class TokenBytes:
    """UTF-8 bytes of each of some tokens, looked up when they are asked for."""

    def __init__(self, table: np.ndarray, tokens: np.ndarray):
        self.table, self.tokens = table, tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: Any) -> np.ndarray:
        return self.table[self.tokens[where]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.table.dtype if dtype is None else dtype)


@dataclass(frozen=True)
class Links:
    """What the links.json of a folder says; a folder without one links nothing."""

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        path = self.folder / RECORD
        if not path.exists():
            return {"files": {}}
        record = read_json(path)
        check_fields(path, record, LINKS)
        for place in record["files"].values():
            check_fields(path, place, PLACE)
        return record

    @cached_property
    def table(self) -> np.ndarray:  # (ids,)
        path = self.folder / TABLE
        check_hash(path, self.record["token_bytes"], RECORD)
        return map_array(path, self.record["bytes_dtype"], self.record["ids"])

    @property
    def any(self) -> bool:
        return bool(self.record["files"])

    def place(self, path: Path, nbytes: int) -> tuple[Path, int]:
        """The file that holds a column's numbers, of its old size still, and where they begin."""
        place = self.record["files"][path.name]
        file, size = Path(place["path"]), place["size"]
        if not file.is_file():
            raise UserError(
                f"{file} is missing: {self.folder} (link=true) has its {path.stem} there; put it "
                "back, or import it again"
            )
        check_regular(file)
        found = file.stat().st_size
        if found != size or place["offset"] + nbytes > size:
            raise UserError(
                f"{file} has {found} bytes, it had {size} when {self.folder} was made of it "
                "(link=true): import it again"
            )
        return file, place["offset"]

    def file(self, path: Path) -> Path:
        """Where a column lies, for messages."""
        files = self.record["files"]
        return Path(files[path.name]["path"]) if path.name in files else path

    def column(self, path: Path, dtype: str, rows: int) -> Any:  # (rows,) or (rows, n)
        """A column, mapped: from where it is linked to, else from `path`, its own file."""
        if path.name not in self.record["files"]:
            return map_array(path, dtype, rows)
        kind = np.dtype(dtype).newbyteorder("<")
        file, offset = self.place(path, rows * kind.itemsize)
        return np.memmap(file, kind, "r", offset, (rows,))

    def check(
        self, path: Path, expected: str, dtype: str, rows: int, advance: Advance = nothing
    ) -> None:
        """`check_hash` of a column; of a linked one, of its numbers where they lie."""
        if path.name not in self.record["files"]:
            check_hash(path, expected, MANIFEST, advance)
            return
        nbytes = rows * np.dtype(dtype).itemsize
        file, offset = self.place(path, nbytes)
        found = hash_slice(file, offset, nbytes, advance)
        if found != expected:
            raise UserError(
                f"{file} is damaged or was changed: {nbytes} bytes from {offset} on have sha256 "
                f"{found}, {MANIFEST} says {expected} (link=true: bring back the file as it was, "
                "or import it again)"
            )


def hash_slice(path: Path, offset: int, nbytes: int, advance: Advance = nothing) -> str:
    """sha256 of a piece of a file, read block by block."""
    digest, left = hashlib.sha256(), nbytes
    with open(path, "rb") as file:
        file.seek(offset)
        while left and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            advance(len(block))
            left -= len(block)
    return digest.hexdigest()
