"""The on-disk format: token shards, aligned reference log-prob shards, their manifests.

A folder holds NumPy ``.npy`` files beside JSON, nothing else::

    corpus/train/    plan.json                what the shards are made of, written first
                     tokens-00000.npy         uint16 or uint32, m * seq_len + 1 tokens
                     documents-00000.npy      int64 (n, 4): start, source, record, first token
                     bytes-00000.npy          UTF-8 bytes of each token
                     masks-00000.npy          bool, only where some tokens are no targets: which are
                     signal-00000.npy         int8, only where some source is labelled: 1 signal,
                                              0 noise, -1 unknown
                     tokens-00000.json        the shard's sidecar: sizes and hashes, written last
                     manifest.json            plan + sidecars + fingerprint; there: whole
    references/x/    logprobs-00000.npy       log p(token i | those before it in its window)
                     entropy-00000.npy        by option: of the distribution that predicts token i

Window w of a shard reads tokens [w * seq_len, (w + 1) * seq_len], so neighbouring windows share one
token, windows never cross shards, and every token but a shard's first is a target exactly once.
No container notices a flipped byte by itself; the hashes here do (``check="full"``, `slm verify`).
A crash leaves temporary files and files without a sidecar, never something that looks finished.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np

from slm.checks import CHECKS
from slm.claims import process_name, remove_temporaries
from slm.errors import UserError
from slm.fields import (
    COLUMN,
    DTYPE,
    FILES,
    INDEX,
    OBJECT,
    SHA256,
    SIZE,
    TEXT,
    check_fields,
    list_of,
    mapping,
    one_of,
    optional,
)

FORMAT = 1
BLOCK_BYTES = 1 << 22
SEAL = "seal"
SHARD = {
    "index": INDEX,
    "num_tokens": SIZE,
    "sha256": mapping(COLUMN, SHA256),
    "dtype": mapping(COLUMN, DTYPE),
    "rows": mapping(COLUMN, INDEX),
}
STORE = {
    "fingerprint": TEXT,
    "tokenizer_sha256": TEXT,
    "vocab_size": SIZE,
    "seq_len": SIZE,
    "packing": one_of("concat", "documents"),
    "shards": list_of(OBJECT),
}
MANIFESTS = {
    "corpus": {"eos_id": INDEX, "sources": list_of(TEXT)},
    "reference": {"corpus_fingerprint": TEXT, "model_sha256": optional(TEXT), "scoring": OBJECT},
}
# Fields of a corpus that decide whether a reference score belongs to a token.
IDENTITY = ("tokenizer_sha256", "vocab_size", "seq_len", "packing")

Json = dict[str, Any]
Advance = Callable[[int], None]


# ---- files ----------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path, needed: int = 0) -> Iterator[BufferedRandom]:
    """An open temporary file in the folder of `path`; synced and renamed to it on success.

    What a killed process has left of the same file is removed.
    needed: the bytes that it will have at least, where that is known
    """
    temporary = path.with_name(f".{path.name}.{process_name()}.tmp")
    remove_temporaries(path.parent, path.name)
    with naming(path, temporary, needed):
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
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


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def sealed(record: Json) -> Json:
    """With the hash of its content: for a record that no other vouches for."""
    return record | {SEAL: hash_json(json.loads(json.dumps(record)))}


def write_record(path: Path, record: Json) -> None:
    """A record that `read_json` will know to be whole."""
    write_json(path, sealed(record))


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


def write_array(path: Path, array: np.ndarray) -> str:
    """Write one ``.npy`` atomically; returns the sha256 of the file as read back."""
    with atomic_file(path) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
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

    def finish(self) -> str:
        """Write the true length into the header; returns the sha256 of the file as read back."""
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256").hexdigest()


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
        raise UserError(f"{path} is damaged: sha256 {digest.hexdigest()}, {source} says {expected}")


def check_files(path: Path, record: Json, advance: Advance = nothing) -> dict[str, str]:
    """Compare what the record in `path` says of files beside it; returns their hashes."""
    check_fields(path, record, {"sha256": FILES})
    for name, expected in record["sha256"].items():
        check_hash(path.parent / name, expected, path.name, advance)
    return record["sha256"]


# ---- one shard, one writer --------------------------------------------------------------------


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
    return folder / f"{column}-{index:05d}{suffix}"


def write_sidecar(folder: Path, column: str, shard: Shard) -> None:
    """Mark a shard as finished; `column` is the file it is named after (tokens, logprobs)."""
    write_json(shard_path(folder, column, shard.index, ".json"), asdict(shard))


def read_sidecars(folder: Path, column: str) -> list[Shard]:
    """The finished shards of a folder, in order."""
    paths = sorted(folder.glob(f"{column}-*.json"))
    return [read_shard(path, read_json(path)) for path in paths]


def read_shard(path: Path, record: Json) -> Shard:
    """`path` is where the record stands."""
    check_fields(path, record, SHARD)
    if not record["sha256"].keys() == record["dtype"].keys() == record["rows"].keys():
        raise UserError(f"{path}: sha256, dtype and rows of a shard name other columns")
    return Shard(**{name: record[name] for name in SHARD})


def adopt_plan(
    folder: Path, plan: Json, what: str = "another run", advice: str = "another output folder"
) -> None:
    """Write plan.json, or check that the one already there says the same thing."""
    path = folder / "plan.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_record(path, plan)
        return
    found = read_json(path)
    # What both have comes first: that a list is shorter says less than what differs in it.
    both = plan.keys() & found.keys()
    for field in [*sorted(both), *sorted(plan.keys() ^ found.keys())]:
        before, now = found.get(field), plan.get(field)
        if before != now:
            raise UserError(
                f"{folder} holds {what}: {field} is {before!r} in plan.json, {now!r} now; "
                f"choose {advice}"
            )


def write_manifest(folder: Path, column: str, num_shards: int) -> Json | None:
    """Write manifest.json once all `num_shards` sidecars are present; None before that."""
    shards = read_sidecars(folder, column)
    if [shard.index for shard in shards] != list(range(num_shards)):
        return None
    manifest = make_manifest(folder, shards)
    write_json(folder / "manifest.json", manifest)
    return manifest


def make_manifest(folder: Path, shards: list[Shard]) -> Json:
    """A function of plan.json, the sidecars and, where there is one, the tokenizer's files."""
    body = read_json(folder / "plan.json") | {"shards": [asdict(shard) for shard in shards]}
    made = body | {"fingerprint": fingerprint(body)}
    if (folder / "tokenizer").is_dir():
        files = sorted((folder / "tokenizer").iterdir())
        made["tokenizer_files"] = {path.name: hash_file(path) for path in files}
    return made


def fingerprint(body: Json) -> str:
    """The identity of a folder's content: no path, date or version is in it."""
    keys = [*IDENTITY, "kind", "corpus_fingerprint", "model_sha256"]
    shards = [[shard["num_tokens"], shard["sha256"]] for shard in body["shards"]]
    return hash_json({key: body[key] for key in keys if key in body} | {"shards": shards})


# ---- reading ------------------------------------------------------------------------------------


def why_not(folder: Path) -> str:
    """Why a folder without manifest.json cannot be opened, and what to do."""
    if not folder.exists():
        return "it does not exist"
    if (folder / "plan.json").exists() and not (folder / "report.json").exists():
        return "it is unfinished, run the command that makes it again"
    inside = [path.parent.name for path in sorted(folder.glob("*/manifest.json"))]
    return f"name a folder in it: {', '.join(inside)}" if inside else "manifest.json is missing"


def read_manifest(folder: Path, kind: str) -> Json:
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} is not a finished {kind}: {why_not(folder)}")
    manifest = read_json(path)
    for field, expected in (("format", FORMAT), ("kind", kind)):
        found = manifest.get(field)
        if found != expected:
            raise UserError(f"{path}: {field} is {found!r}, expected {expected!r}")
    check_fields(path, manifest, STORE | MANIFESTS[kind])
    if manifest["fingerprint"] != fingerprint(manifest):
        raise UserError(f"{path}: its content does not match its fingerprint; it was edited")
    return manifest


@dataclass(frozen=True)
class Store:
    """A finished folder of shards, opened read-only."""

    folder: Path
    manifest: Json

    @classmethod
    def open(cls, folder: str | Path, check: str = "size"):
        """Open and check a folder. check: "size" (lengths, dtypes) or "full" (hashes as well)."""
        if check not in CHECKS:
            raise UserError(f"check must be one of {CHECKS}, found {check!r}")
        folder = Path(folder)
        store = cls(folder, read_manifest(folder, cls.KIND))
        for shard in store.shards:
            for column in shard.sha256:
                store.column(column, shard.index)
        if check == "full":
            store.check_hashes()
        return store

    KIND = "store"

    @cached_property
    def shards(self) -> list[Shard]:
        path = self.folder / "manifest.json"
        found = [read_shard(path, shard) for shard in self.manifest["shards"]]
        if [shard.index for shard in found] != list(range(len(found))):
            raise UserError(f"{path}: its shards are numbered {[s.index for s in found]}")
        return found

    def check_hashes(self, advance: Advance = nothing) -> None:
        """Of every column of every shard."""
        for shard in self.shards:
            for column, expected in shard.sha256.items():
                check_hash(shard.path(self.folder, column), expected, "manifest.json", advance)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def column(self, name: str, index: int) -> np.ndarray:
        """One column of one shard, memory-mapped."""
        shard = self.shards[index]
        if name not in shard.rows:
            raise UserError(f"{self.folder}/manifest.json: shard {index} has no {name}")
        return map_array(shard.path(self.folder, name), shard.dtype[name], shard.rows[name])


class Corpus(Store):
    """Token shards: ``tokens``, ``documents``, ``bytes``; by need ``masks`` and ``signal``."""

    KIND = "corpus"

    @classmethod
    def open(cls, folder: str | Path, check: str = "size"):
        """The tokenizer's files are small and what they say is believed: hashed at every check."""
        corpus = super().open(folder, check)
        if corpus.has_tokenizer_hashes:
            check_fields(
                Path(folder) / "manifest.json", corpus.manifest, {"tokenizer_files": FILES}
            )
            for name, expected in corpus.manifest["tokenizer_files"].items():
                check_hash(corpus.tokenizer_folder / name, expected, "manifest.json")
        return corpus

    @property
    def has_tokenizer_hashes(self) -> bool:
        """Older corpora know the tokenizer's identity alone (slm.tokenizer)."""
        return "tokenizer_files" in self.manifest

    @property
    def seq_len(self) -> int:
        return self.manifest["seq_len"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @cached_property
    def has_masks(self) -> bool:
        """Some tokens (prompts) are no targets."""
        return any("masks" in shard.sha256 for shard in self.shards)

    @cached_property
    def has_signal(self) -> bool:
        """Some tokens are known to be signal or noise."""
        return any("signal" in shard.sha256 for shard in self.shards)

    @cached_property
    def windows_per_shard(self) -> list[int]:
        return [(shard.num_tokens - 1) // self.seq_len for shard in self.shards]

    @property
    def num_windows(self) -> int:
        return sum(self.windows_per_shard)

    @property
    def num_targets(self) -> int:
        return self.num_windows * self.seq_len


class References(Store):
    """Log-prob shards aligned with a corpus: ``logprobs`` and, by option, ``entropy`` columns."""

    KIND = "reference"

    def check_matches(self, corpus: Corpus) -> None:
        """Refuse a reference that was scored on anything but this corpus."""
        theirs, ours = self.manifest["corpus_fingerprint"], corpus.fingerprint
        if theirs == ours:
            self.check_lengths(corpus)
            return
        for field in IDENTITY:
            if self.manifest[field] != corpus.manifest[field]:
                raise UserError(
                    f"{self.folder} does not belong to {corpus.folder}: {field} is "
                    f"{self.manifest[field]!r} in the reference, "
                    f"{corpus.manifest[field]!r} in the corpus"
                )
        raise UserError(
            f"{self.folder} scores another corpus than {corpus.folder}: corpus fingerprint "
            f"{theirs} in the reference, {ours} in the corpus (other text, or another order)"
        )

    def check_lengths(self, corpus: Corpus) -> None:
        theirs, ours = ([shard.num_tokens for shard in store.shards] for store in (self, corpus))
        if theirs != ours:
            raise UserError(
                f"{self.folder}/manifest.json is damaged: its shards have {theirs} tokens, those "
                f"of {corpus.folder} {ours}"
            )
