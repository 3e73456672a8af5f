"""Files that are whole or not there: written beside their place, synced, renamed; hashes; JSON.

A crash leaves temporary files, never something that looks finished. A record that no other file
vouches for is sealed: it holds the hash of its own content.
"""

import csv
import errno
import hashlib
import io
import json
import math
import mmap
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.store.claims import process_name, remove_temporaries
from slm.store.fields import FILES, check_fields

AROUND = 1 << 22  # bytes that a page fault may map before its place, generously
BLOCK_BYTES = 1 << 22
SEAL = "seal"

Json = dict[str, Any]
Advance = Callable[[int], None]
Publish = Callable[[Path, Path], None]  # temporary file, its place


@contextmanager
def atomic_file(
    path: Path, needed: int = 0, publish: Publish | None = None
) -> Iterator[BufferedRandom]:
    """An open temporary file in the folder of `path`; synced and renamed to it on success.

    What a killed process has left of the same file is removed.
    needed: the bytes that it will have at least, where that is known
    publish: gives it its name; that of a Claim never overwrites another owner's
    """
    temporary = path.with_name(f".{path.name}.{process_name()}.tmp")
    remove_temporaries(path.parent, path.name)
    with naming(path, temporary, needed):
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (publish or os.replace)(temporary, path)
    sync_folder(path.parent)


@contextmanager
def naming(path: Path, new: Path | None = None, needed: int = 0) -> Iterator[None]:
    """A write that fails ends in one sentence: a full disk says neither where nor how much.

    new: what takes the place of `path` at the end; removed where that fails
    """
    try:
        yield
    except BaseException as error:
        if new is not None:
            remove(new)
        is_said = isinstance(error, UserError) or not isinstance(error, Exception)
        cause = None if is_said else write_error(error, path, new or path)
        if cause is None:
            raise
        raise cannot_write(path, cause, needed) from cause


def write_error(error: BaseException | None, *paths: Path) -> OSError | None:
    """What the system said of writing one of `paths`; None where something else went wrong.

    A full disk names no file. torch's zip writer raises an error of its own on top of it, and
    what is written in Rust (safetensors, tokenizers) has it in its text.
    """
    while error is not None:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            error = OSError(int(found[1]), os.strerror(int(found[1])))
        if isinstance(error, OSError):
            name = error.filename
            is_mine = type(error) is OSError if name is None else is_within(str(name), paths)
            return error if is_mine else None
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def is_within(name: str, paths: Sequence[Path]) -> bool:
    return any(Path(name).is_relative_to(path) for path in paths)


def cannot_write(path: Path, cause: OSError, needed: int = 0) -> UserError:
    """The sentence, when what was begun is removed: all that is free then was not enough."""
    text = f"{path} cannot be written: {cause.strerror or cause}"
    if cause.errno == errno.ENOSPC:
        place = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(place).free
        text += f"; more than {max(needed, free):,} bytes are needed, the disk has {free:,} free"
    return UserError(text)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_empty(folders: Sequence[Path]) -> None:
    """Those of folders that this process made, innermost first, in which nothing came to be."""
    for folder in folders:
        with suppress(OSError):  # it has files, or is gone
            folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_regular(path: Path) -> None:
    """A pipe or a device is not opened: reading it may take for ever."""
    if not path.exists():
        raise UserError(f"{path} is missing")
    if not path.is_file():
        raise UserError(f"{path} is no regular file")


def hash_file(path: Path) -> str:
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any, publish: Publish | None = None) -> None:
    with atomic_file(path, publish=publish) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def sealed(record: Json) -> Json:
    """With the hash of its content: for a record that no other vouches for."""
    return record | {SEAL: hash_json(json.loads(json.dumps(record)))}


def write_record(path: Path, record: Json, publish: Publish | None = None) -> None:
    """A record that `read_json` will know to be whole."""
    write_json(path, sealed(record), publish)


def read_json(path: Path) -> Json:
    """The object in a file. One that was sealed is compared with its seal, which is left out."""
    return read_sealed(path)[0]


def read_sealed(path: Path) -> tuple[Json, bool]:
    """The object, and whether a seal vouches for it."""
    if path.exists():
        check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(value).__name__}")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != hash_json(value):
        raise UserError(
            f"{path} is damaged or was edited: its content has sha256 {hash_json(value)}, "
            f"its {SEAL} says {seal}"
        )
    return value, seal is not None


def nested(flat: Json, prefix: str) -> Json:
    """{"selection.a.b": 1} -> {"a": {"b": 1}}"""
    tree: Json = {}
    for key, value in flat.items():
        if key.startswith(prefix):
            *parents, last = key.removeprefix(prefix).split(".")
            branch = tree
            for name in parents:
                branch = branch.setdefault(name, {})
            branch[last] = value
    return tree


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a row, all with the keys of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def write_array(path: Path, array: np.ndarray, publish: Publish | None = None) -> str:
    """Write one ``.npy`` atomically; returns the sha256 of the file as read back."""
    assert not array.dtype.hasobject, f"{path}: objects are not written"
    array, form = np.ascontiguousarray(array), np.lib.format
    with atomic_file(path, publish=publish) as file:
        form.write_array_header_1_0(file, form.header_data_from_array_1_0(array))
        file.write(array.data)  # write_array would copy it, piece by piece, into such a file
        return synced_sha256(file)


def synced_sha256(file: BufferedRandom | BufferedReader) -> str:
    """Of what was written, as read back while the disk is at it."""
    file.flush()
    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    synced.result()
    return digest


def map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    """Memory-map a one- or two-dimensional ``.npy`` of `length` rows; its size must be exact."""
    check_regular(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a header is parsed as Python, and damage has many names there
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged or truncated: {reason}") from None
    rows = array.shape[0] if array.ndim in (1, 2) else f"an array of shape {array.shape}, not"
    if array.dtype != np.dtype(dtype) or rows != length:
        raise UserError(
            f"{path} holds {rows} rows of {array.dtype}, its manifest says {length} of {dtype}"
        )
    expected, found = array.offset + array.nbytes, path.stat().st_size
    if expected != found:
        raise UserError(f"{path} has {found} bytes, its header says {expected}")
    return array


def release(column: Any, first: int, last: int) -> None:
    """Of a mapped array, rows [first, last) that were read: their pages count as this process's
    memory until they are given back.

    So do those that a fault maps around the one it needs, before `first` too.
    """
    size, lead = column.dtype.itemsize * math.prod(column.shape[1:]), column.offset % mmap.PAGESIZE
    begin = max(0, lead + first * size - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED"):
        column.base.madvise(mmap.MADV_DONTNEED, begin, lead + last * size - begin)


class Recent:
    """What was mapped last. A process may have so many files open (1,024 is usual) and no more, and
    a map holds its file open: those mapped first are let go.
    """

    def __init__(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = max(32, min(files // 4, 8192))  # of 65,530 maps, Linux's own limit
        self._kept: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, unless it is there still."""
        if key not in self._kept:
            while len(self._kept) >= self.most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make()
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        # Workers map the files themselves: a pickled memory map would carry its data.
        return self.__dict__ | {"_kept": {}}


class ArrayWriter:
    """Writes a ``.npy`` block by block, so that memory does not grow with the shard.

    NumPy pads the header so that the final length can be written over the provisional one.
    """

    def __init__(self, file: BufferedRandom, dtype: str, columns: int | None = None):
        self.file, self.dtype, self.columns, self.length = file, np.dtype(dtype), columns, 0
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.length,) if self.columns is None else (self.length, self.columns)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, block: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(block, dtype=self.dtype).data)
        self.length += len(block)

    def end(self) -> None:
        """Write the true length into the header."""
        self.file.seek(0)
        self._write_header()
        self.file.flush()

    def finish(self) -> str:
        """End it; returns the sha256 of the file as read back."""
        self.end()
        return synced_sha256(self.file)


def nothing(count: int) -> None:
    """Nobody watches."""


def check_hash(path: Path, expected: str, source: str, advance: Advance = nothing) -> None:
    """`source` is the record that says so; `advance` is told the number of bytes read."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != expected:
        raise UserError(
            f"{path} is damaged: sha256 {digest.hexdigest()}, {source} says {expected} (of the "
            "file's content: bring back the file that was written, or make it again)"
        )


def check_content(path: Path, record: Json, source: str, advance: Advance = nothing) -> None:
    """Compare a file with what its record says, or a folder, whose `files` are in it."""
    if "files" not in record:
        check_hash(path, record["sha256"], source, advance)
        return
    check_fields(path.with_name(source), record, {"files": FILES})
    if hash_json(record["files"]) != record["sha256"]:
        raise UserError(f"{source} is damaged: its sha256 is not that of its files' hashes")
    for name, expected in record["files"].items():
        check_hash(path / name, expected, source, advance)


def check_files(path: Path, record: Json, advance: Advance = nothing) -> dict[str, str]:
    """Compare what the record in `path` says of files beside it; returns their hashes."""
    check_fields(path, record, {"sha256": FILES})
    for name, expected in record["sha256"].items():
        check_hash(path.parent / name, expected, path.name, advance)
    return record["sha256"]


def check_records(folder: Path, *patterns: str) -> None:
    """Read the records that nothing but their own seal vouches for."""
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        if not read_sealed(path)[1]:
            raise UserError(f"{path} is damaged or was edited: the hash of its content is gone")
