"""`slm import link=true`: shards that say where their tokens lie, and hold none (slm.store.links).

Each file is cut into shards by itself, since a shard lies in one piece; the tokens at its end that
fill no window are left out. Every token is read once for its hash and once for ids and EOS.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.encoder import EncoderState
from slm.prepare.imports.parts import Part
from slm.prepare.imports.stream import Block, Stream
from slm.store.files import release, write_array, write_record
from slm.store.links import RECORD, TABLE, hash_slice
from slm.store.sidecars import Shard, shard_path, write_sidecar

HASHED_AT_ONCE = 2  # slices, a thread each
KINDS = ("bool", "uint8", "uint16", "uint32", "int32", "int64")


class Waiting(NamedTuple):
    """A shard whose tokens are being hashed."""

    shard: Shard
    hashes: dict[str, Future[str]]


class LinkWriter:
    """The shards of a corpus, out of the parts of all its sources."""

    def __init__(self, folder: Path, seq_len: int, shard_tokens: int, state: EncoderState):
        self.folder, self.seq_len, self.state = folder, seq_len, state
        self.capacity = max(1, (shard_tokens - 1) // seq_len) * seq_len + 1
        self.num_shards = self.dropped = 0
        self.files: dict[str, dict[str, Any]] = {}
        self.open = np.empty((0, 3), np.int64)  # the last document: start in the part, as in `rows`
        self.pool = ThreadPoolExecutor(HASHED_AT_ONCE)
        self.waiting: deque[Waiting] = deque()

    def __enter__(self) -> "LinkWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def add(self, part: Part, stream: Stream, advance: Callable[[int], Any]) -> None:
        total = len(part.tokens)
        columns = {"tokens": part.tokens} | ({} if part.masks is None else {"masks": part.masks})
        places = {name: place_of(part.place, column) for name, column in columns.items()}
        cuts = self.cuts(total)
        for first in np.cumsum([0, *cuts]).tolist():
            length = cuts.pop(0) if cuts else total - first
            piece = cut_part(part, first, length)
            found = [self.open]
            for block, begin, end in stream.documents(piece):
                found.append(rows(block, first + begin))
                release(part.tokens, first + begin, first + end)
                advance(end - begin)
            found = np.concatenate(found)
            if length > self.seq_len:
                begin = int(np.searchsorted(found[:, 0], first, side="right")) - 1
                self.add_shard(found[begin:], first, length, columns, places)
            self.open = found[-1:]
        self.open[:, 0] -= total

    def cuts(self, total: int) -> list[int]:
        """Tokens of each shard of a file: full ones, and a last one of whole windows."""
        full, rest = divmod(total, self.capacity)
        windows = max(0, rest - 1) // self.seq_len
        cuts = [self.capacity] * full + [windows * self.seq_len + 1] * (windows > 0)
        self.dropped += total - sum(cuts)
        return cuts

    def add_shard(
        self,
        found: np.ndarray,  # (d, 3): of the document at its begin, and those that begin in it
        first: int,
        length: int,
        columns: dict[str, Any],
        places: dict[str, dict[str, Any]],
    ) -> None:
        index, start = self.num_shards, found[:, 0] - first
        path = shard_path(self.folder, "documents", index)
        table = np.column_stack([start, found[:, 1:], np.maximum(0, -start)])
        hashes, dtype = {"documents": write_array(path, table)}, {"documents": "int64"}
        futures, lengths = {}, {"documents": len(table)}
        for name, column in columns.items():
            size, place = column.dtype.itemsize, places[name]
            mine = place | {"offset": place["offset"] + first * size}
            self.files[shard_path(self.folder, name, index).name] = mine
            where = (Path(place["path"]), mine["offset"], length * size)
            futures[name] = self.pool.submit(hash_slice, *where)
            dtype[name], lengths[name] = column.dtype.name, length
        self.waiting.append(Waiting(Shard(index, length, hashes, dtype, lengths), futures))
        self.num_shards += 1
        if len(self.waiting) > 2 * HASHED_AT_ONCE:
            self.write_sidecar()

    def write_sidecar(self) -> None:
        shard, hashes = self.waiting.popleft()
        shard.sha256.update((name, future.result()) for name, future in hashes.items())
        write_sidecar(self.folder, "tokens", shard)

    def finish(self) -> int:
        """The last sidecars and links.json; returns the number of tokens that fill no window."""
        while self.waiting:
            self.write_sidecar()
        table = self.state.bytes_table.astype(self.state.bytes_dtype)
        record: dict[str, Any] = {
            "files": self.files,
            "ids": len(table),
            "bytes_dtype": table.dtype.name,
        }
        record["token_bytes"] = write_array(self.folder / TABLE, table)
        write_record(self.folder / RECORD, record)
        return self.dropped


def cut_part(part: Part, first: int, length: int) -> Part:
    """Its tokens [first, first + length) and the ends among them."""
    span = slice(first, first + length)
    ends = None
    if part.ends is not None:
        inside = np.searchsorted(part.ends, [first, first + length], side="right")
        ends = part.ends[slice(*inside)] - first
    place = f"{part.place}, from token {first} on" if first else part.place
    return Part(place, part.tokens[span], ends, None if part.masks is None else part.masks[span])


def rows(block: Block, at: int) -> np.ndarray:  # (d, 3)
    """Of documents that begin in a block, which begins at token `at`: start, source, record."""
    ends = at + block.carried + np.cumsum(block.documents[:, 0])
    return np.column_stack([ends - block.documents[:, 0], block.documents[:, 1:]])


def place_of(where: str, column: Any) -> dict[str, Any]:
    """The file of a mapped column, and where in it the numbers begin."""
    plain = isinstance(column, np.memmap) and isinstance(column.base, mmap)
    if not plain or column.dtype.name not in KINDS or column.dtype.byteorder == ">":
        raise UserError(
            f"{where}: its {column.dtype.name} are no plain numbers in a file ({', '.join(KINDS)}; "
            "nanogpt, llmc, npy, megatron, olmo, datatrove and litdata have such): link=false"
        )
    path = Path(str(column.filename)).absolute()
    return {"path": str(path), "offset": column.offset, "size": path.stat().st_size}
