"""What every reader yields: tokens that lie on a disk, and where documents end in them."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.readers import CODECS, OPENERS, open_stream
from slm.store.fields import FILE, OBJECT, Field, check_fields, list_of
from slm.store.files import Json, check_regular, read_json


class Part(NamedTuple):
    """Tokens of one file, or of a piece of it."""

    place: str  # the file, and where in it: for messages
    tokens: np.ndarray  # (n,) integers, memory-mapped
    ends: np.ndarray | None = None  # (d,) ascending, the last one n; None: only EOS tells
    masks: np.ndarray | None = None  # (n,) bool: is the token a target
    weights: np.ndarray | None = None  # (n,) float32: what its loss is multiplied by

    @property
    def by_need(self) -> dict[str, np.ndarray]:
        """The columns of slm.store.shards.BY_NEED that it has."""
        found = {"masks": self.masks, "weights": self.weights}
        return {name: column for name, column in found.items() if column is not None}


class Options(NamedTuple):
    """Of the keys of `slm import`, what the readers look at; None: not given."""

    vocab_size: int
    dtype: str | None = None
    column: str | None = None
    masks: str | None = None

    @property
    def token_dtype(self) -> str:
        """Of files that do not say it: the smallest unsigned type for the vocabulary."""
        return self.dtype or ("uint16" if self.vocab_size <= 65536 else "uint32")


def find_files(given: str, suffix: str) -> list[Path]:
    """A file, those of a folder, of a glob; sorted by path."""
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    found = path.rglob(f"*{suffix}") if path.is_dir() else map(Path, glob.glob(str(path)))
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UserError(f"{given}: there is no such file, glob, or folder with *{suffix} in it")
    return files


def map_numbers(
    path: Path, dtype: str | np.dtype, offset: int = 0, count: int | None = None
) -> np.ndarray:  # (count,)
    """Little-endian numbers of a file without a header of NumPy's; count: None is the rest."""
    check_regular(path)
    kind, size = np.dtype(dtype).newbyteorder("<"), path.stat().st_size
    if count is None:
        if size < offset or (size - offset) % kind.itemsize:
            raise UserError(
                f"{path} has {size} bytes, {offset} of them before the numbers: the rest is no "
                f"multiple of the {kind.itemsize} of {kind.name}"
            )
        count = (size - offset) // kind.itemsize
    if size < offset + count * kind.itemsize:
        raise UserError(
            f"{path} is truncated: it has {size} bytes, {count} {kind.name} from byte {offset} on "
            f"need {offset + count * kind.itemsize}"
        )
    if count == 0:
        return np.empty(0, kind)
    return np.memmap(path, kind, "r", offset, (count,))


def read_listing(index: Path, key: str, row: Mapping[str, Field]) -> list[Json]:
    """What index.json of MDS ("shards") or LitData ("chunks") says of the files beside it."""
    if not index.is_file():
        raise UserError(f"{index} is missing: the path is the folder that holds it")
    record, other = read_json(index), {"shards": "mds", "chunks": "litdata"}
    for found, name in other.items():
        if key not in record and found in record:
            raise UserError(f"{index} lists {found}, not {key}: format={name} reads it")
    check_fields(index, record, {key: list_of(OBJECT)})
    for item in record[key]:
        check_fields(index, item, row)
    return record[key]


def listed_bytes(index: Path, raw: Json, packed: Json | None) -> tuple[Path, np.ndarray]:
    """A file that index.json names, (b,) uint8; if only its compressed form is there, in memory."""
    check_fields(index, raw, {"basename": FILE})
    path, known = index.with_name(raw["basename"]), (*OPENERS, *CODECS)
    if packed is None or path.exists():
        return path, map_numbers(path, "uint8")
    check_fields(index, packed, {"basename": FILE})
    path = index.with_name(packed["basename"])
    if path.suffix not in known:
        raise UserError(f"{path} is compressed, and only {', '.join(known)} are read")
    with open_stream(str(path)) as file:
        return path, np.frombuffer(file.read(), np.uint8)


def check_ends(path: Path, ends: np.ndarray, total: int) -> np.ndarray:
    """path: of the index, which says where documents end."""
    if len(ends) and (ends[0] < 0 or (np.diff(ends.astype(np.int64)) < 0).any()):
        raise UserError(f"{path}: the ends of documents do not ascend")
    last = int(ends[-1]) if len(ends) else 0
    if last != total:
        raise UserError(f"{path}: its last document ends at token {last}, the file has {total}")
    return ends.astype(np.int64)


def same_length(path: Path, masks: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    if len(masks) != len(tokens):
        raise UserError(f"{path} has {len(masks)} entries, its tokens are {len(tokens)}")
    return masks
