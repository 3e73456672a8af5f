"""A frozen set of tokens: whole held-out windows, with all that is known of their targets.

    windows.npy            int64 (W,): which windows of the corpus
    tokens.npy             uint32 (W, T + 1): their tokens; the last T are the targets
    live.npy               bool (W, T): which of them are targets (no prompts, no first tokens)
    source.npy             uint16 (M,): index into the corpus's sources
    reference_loss.npy     float32 (M,): nats, where there are references; and what else they have
    signal.npy             int8 (M,): 1 signal, 0 noise, -1 unknown, where the corpus has labels
    pieces.json            token id -> its bytes, in hexadecimal
    token_set.json         sha256 of each of these, written last

M targets stand in the order of the windows and, within one, of the positions: `column[live]` of a
(W, T) array. The folder needs neither corpus nor tokenizer to be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from slm.errors import UserError
from slm.score.token_texts import vocabulary_bytes, whole_characters
from slm.store.columns import COLUMNS, DTYPE
from slm.store.fields import FILES, SIZE, check_fields
from slm.store.files import hash_file, map_array, read_json, write_array, write_json, write_record
from slm.store.windows import IGNORE_INDEX, Windows

CONTEXT = 12  # tokens on either side of one


def target_columns() -> dict[str, str]:
    """Name of what may be known of every target -> its dtype on disk."""
    scores = {column.frozen_name: DTYPE for column in COLUMNS.values()}
    return {"source": "uint16", **scores, "signal": "int8"}


def token_set_files() -> list[str]:
    arrays = ("windows", "tokens", "live", *target_columns())
    return ["token_set.json", "pieces.json", *(f"{name}.npy" for name in arrays)]


@dataclass(frozen=True)
class TokenSet:
    """Whole windows and their targets; `columns` has the names in target_columns that are known."""

    windows: np.ndarray  # (W,) int64
    tokens: np.ndarray  # (W, T + 1) uint32
    live: np.ndarray  # (W, T) bool
    columns: Mapping[str, np.ndarray]  # (M,) each
    pieces: Mapping[int, bytes]  # of the token ids that occur

    @property
    def num_targets(self) -> int:
        return int(self.live.sum())

    @cached_property
    def targets(self) -> np.ndarray:  # (M,) token ids
        return self.tokens[:, 1:][self.live]

    @cached_property
    def places(self) -> np.ndarray:  # (M, 2): row and position of each target in `live`
        return np.argwhere(self.live)

    def spread(self, values: np.ndarray, missing: float = np.nan) -> np.ndarray:
        """(M,) -> (W, T), with `missing` where there is no target."""
        grid = np.full(self.live.shape, missing, values.dtype)
        grid[self.live] = values
        return grid


# ---- drawing ------------------------------------------------------------------------------------


def draw_windows(windows: Windows, num_targets: int, seed: int, by_source: bool) -> np.ndarray:
    """Whole windows, drawn by seed until they have `num_targets` targets; ascending, (W,) int64.

    by_source:  draw from the sources in turn, a window being of the source of most of its targets,
                so that rare sources have enough tokens to speak of
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(windows))
    if by_source:
        order = in_turn(order, main_sources(windows, order))
    chosen, live = [], 0
    for part in parts(order):
        counts = live_targets(windows, part).sum(1)
        enough = int(np.searchsorted(live + np.cumsum(counts), num_targets)) + 1
        chosen.append(part[:enough])
        live += int(counts.sum())
        if live >= num_targets:
            break
    return np.sort(np.concatenate(chosen))


def parts(numbers: np.ndarray, size: int = 256) -> list[np.ndarray]:
    return np.split(numbers, range(size, len(numbers), size))


def live_targets(windows: Windows, numbers: np.ndarray) -> np.ndarray:  # (B, T) bool
    return windows.batch(numbers)["targets"].numpy() != IGNORE_INDEX


def main_sources(windows: Windows, numbers: np.ndarray) -> np.ndarray:  # (B,)
    found: list[int] = []
    for part in parts(numbers):
        rows = zip(windows.sources(part), live_targets(windows, part), strict=True)
        found += [int(np.bincount(row[live], minlength=1).argmax()) for row, live in rows]
    return np.array(found)


def in_turn(numbers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The first of every source, then the second of every source, ..."""
    rank = np.empty(len(numbers), np.int64)
    for index in np.unique(source):
        mine = source == index
        rank[mine] = np.arange(mine.sum())
    return numbers[np.lexsort((source, rank))]


def read_windows(
    windows: Windows, numbers: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> TokenSet:
    """All that the corpus and its references say of these windows."""
    live = np.concatenate([live_targets(windows, part) for part in parts(numbers)])
    if not live.any():
        raise UserError(f"{windows.corpus.folder}: the {len(numbers)} windows have no target")
    tokens = np.concatenate([windows.tokens(part) for part in parts(numbers)])
    columns = {"source": np.concatenate([windows.sources(part) for part in parts(numbers)])[live]}
    if windows.references:
        columns |= reference_columns(windows, numbers, live)
    if windows.has_signal:
        columns["signal"] = np.concatenate([windows.signal(p) for p in parts(numbers)])[live]
    known = vocabulary_bytes(tokenizer)
    pieces = {int(index): known[int(index)] for index in np.unique(tokens)}
    dtypes = target_columns()
    typed = {name: column.astype(dtypes[name]) for name, column in columns.items()}
    return TokenSet(numbers, tokens.astype(np.uint32), live, typed, pieces)


def reference_columns(windows: Windows, numbers: np.ndarray, live: np.ndarray) -> dict:
    batches = [windows.batch(part) for part in parts(numbers)]
    return {
        column.frozen_name: column.frozen(
            np.concatenate([batch[column.key].numpy() for batch in batches])[live]
        )
        for column in windows.columns
    }


# ---- on disk ------------------------------------------------------------------------------------


def write_token_set(folder: Path, tokens: TokenSet) -> None:
    """token_set.json comes last: what it does not name is not there."""
    arrays = {
        "windows": tokens.windows,
        "tokens": tokens.tokens,
        "live": tokens.live,
        **tokens.columns,
    }
    hashes = {f"{name}.npy": write_array(folder / f"{name}.npy", a) for name, a in arrays.items()}
    pieces = {str(index): piece.hex() for index, piece in tokens.pieces.items()}
    write_json(folder / "pieces.json", pieces)
    hashes["pieces.json"] = hash_file(folder / "pieces.json")
    record = {"num_windows": len(tokens.windows), "num_targets": tokens.num_targets}
    write_record(folder / "token_set.json", record | {"sha256": hashes})


def read_token_set(folder: Path) -> TokenSet:
    record = read_json(folder / "token_set.json")
    fields = {"num_windows": SIZE, "num_targets": SIZE, "sha256": FILES}
    check_fields(folder / "token_set.json", record, fields)
    num_windows, num_targets = record["num_windows"], record["num_targets"]

    def rows(name: str, dtype: str, length: int) -> np.ndarray:
        return map_array(folder / f"{name}.npy", dtype, length)

    return TokenSet(
        rows("windows", "int64", num_windows),
        rows("tokens", "uint32", num_windows),
        rows("live", "bool", num_windows),
        {
            name: rows(name, dtype, num_targets)
            for name, dtype in target_columns().items()
            if f"{name}.npy" in record["sha256"]
        },
        {int(k): bytes.fromhex(piece) for k, piece in read_json(folder / "pieces.json").items()},
    )


# ---- text ---------------------------------------------------------------------------------------


class Context(NamedTuple):
    """A target with the text around it, from its own window."""

    id: int
    window: int  # of the corpus
    before: str
    text: str
    bytes: str | None  # `e2 80`, where the token is no whole characters
    after: str


def in_context(tokens: TokenSet, target: int) -> Context:
    row, position = tokens.places[target]
    place = int(position) + 1  # among the window's T + 1 tokens
    ids = tokens.tokens[row].tolist()
    pieces = [tokens.pieces[token] for token in ids]
    texts = whole_characters(pieces)
    return Context(
        id=ids[place],
        window=int(tokens.windows[row]),
        before="".join(texts[max(0, place - CONTEXT) : place]),
        text=texts[place],
        bytes=None if is_whole(pieces[place]) else pieces[place].hex(" "),
        after="".join(texts[place + 1 : place + 1 + CONTEXT]),
    )


def is_whole(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
