"""The concentrated corpus on disk: texts of documents, spans of what was kept, or rows of tokens.

A document's text is the bytes of its tokens end to end, so every byte of what was read comes back,
whatever tokens cut. A character that several tokens share was kept if one of them was.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from slm.console import progress
from slm.errors import UserError
from slm.prepare.export_rows import columns
from slm.score.texts import Texts
from slm.store.documents import Documents
from slm.store.files import Json, atomic_file
from slm.store.shards import Corpus
from slm.store.windows import IGNORE_INDEX, WEIGHT, Windows
from slm.train.kept import KEPT, Kept, Shares, first_targets

log = logging.getLogger("slm.train")
ROWS_AT_ONCE = 256
CONTINUES, LEAD = 0x80, 0xC0  # a byte of UTF-8 & LEAD == CONTINUES: not the first of its character

# ---- texts --------------------------------------------------------------------------------------


def texts_of(corpus: Corpus) -> Texts:
    texts = Texts(Documents(corpus), names_special=False)
    if texts.tokenizer.backend_tokenizer.normalizer is not None:
        log.warning(
            "%s: its tokenizer normalizes text: what it changes but spaces does not come back",
            corpus.folder,
        )
    return texts


def read(texts: Texts, document: int) -> tuple[str, np.ndarray]:
    """The text of a document, and the bytes of it that each of its tokens has (n,)."""
    found = texts.read(document)
    data = found.data if found.is_whole else found.data[: whole_length(found.data)]
    try:
        return data.decode(), found.sizes
    except UnicodeDecodeError as error:
        raise UserError(f"{texts.documents.name(document)} is no UTF-8 ({error})") from None


def whole_length(data: bytes) -> int:
    """Without the beginning of a character at its end."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start if error.end == len(data) else len(data)
    return len(data)


def kept_characters(text: str, sizes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(characters,) bool, of tokens (n,) of so many bytes, kept (n,) bool or not."""
    data = np.frombuffer(text.encode(), np.uint8)
    character = np.cumsum((data & LEAD) != CONTINUES) - 1  # of each byte
    found = np.zeros(len(text), bool)
    found[character[np.repeat(kept, sizes)[: len(data)]]] = True
    return found


def spans(inside: np.ndarray) -> list[list[int]]:  # (n,) bool -> [start, end) of each run
    edges = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()


def write_texts(
    corpus: Corpus, kept: Kept, found: Shares, taken: np.ndarray, folder: Path, has_spans: bool
) -> None:
    """documents.jsonl or spans.jsonl, in the corpus's order."""
    texts, path = texts_of(corpus), folder / ("spans.jsonl" if has_spans else "documents.jsonl")
    with (
        atomic_file(path) as file,
        progress("writing", int(found.tokens[taken].sum()), "tokens") as advance,
    ):
        for number in np.flatnonzero(taken).tolist():
            begin, end = int(found.begins[number]), int(found.ends[number])
            text, sizes = read(texts, number)
            record = about(corpus, found, number) | {"text": text}
            if has_spans:
                inside = kept_characters(text, sizes, kept.state[begin:end] == KEPT)
                record |= {"signal": spans(inside), "mask": spans(~inside)}
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            advance(end - begin)


def about(corpus: Corpus, found: Shares, number: int) -> Json:
    """Of one document; null: the rule had no token of it to choose from, or no score is known."""
    numbers: dict[str, Any] = {"share": found.share[number], "excess": found.excess[number]}
    known = {name: None if np.isnan(v) else round(float(v), 6) for name, v in numbers.items()}
    source = corpus.manifest["sources"][found.source[number]]
    return {"source": source, "record": int(found.record[number])} | known


# ---- rows ---------------------------------------------------------------------------------------


def write_rows(windows: Windows, kept: Kept, folder: Path) -> None:
    """rows.parquet, a row a window: input_ids and labels of seq_len + 1 tokens; by need
    seq_lengths, the documents in the row, and token_weight."""
    corpus, places = windows.corpus, first_targets(windows.corpus)
    fields = [(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")]
    if is_apart(corpus):
        fields.append(("seq_lengths", pa.list_(pa.int32())))
    if corpus.has_weights:
        fields.append((WEIGHT, pa.list_(pa.float32())))
    schema = pa.schema(fields)
    with (
        atomic_file(folder / "rows.parquet") as file,
        ParquetWriter(file, schema) as writer,
        progress("writing", len(windows), "rows") as advance,
    ):
        for numbers in in_parts(len(windows)):
            at = places[numbers][:, None] + np.arange(corpus.seq_len)
            made = row_columns(windows, numbers, kept.state[at] == KEPT)
            writer.write_table(pa.table({name: list(made[name]) for name in schema.names}, schema))
            advance(len(numbers))


def in_parts(count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, ROWS_AT_ONCE):
        yield np.arange(start, min(start + ROWS_AT_ONCE, count))


def is_apart(corpus: Corpus) -> bool:
    return corpus.manifest["packing"] == "documents"


def row_columns(
    windows: Windows, numbers: np.ndarray, kept: np.ndarray
) -> dict[str, Any]:  # of the rows: (B, T + 1) each, but seq_lengths
    ids = windows.tokens(numbers)
    labels = np.full(ids.shape, IGNORE_INDEX)
    labels[:, 1:] = np.where(kept, ids[:, 1:], IGNORE_INDEX)
    made: dict[str, Any] = {"input_ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}
    if is_apart(windows.corpus):
        first = windows.document_starts(numbers)
        first[:, 0] = True  # a document that began in an earlier window begins anew with the row
        starts = [np.append(np.flatnonzero(row), len(row)) for row in first]
        made["seq_lengths"] = [np.diff(row).astype(np.int32) for row in starts]
    if windows.corpus.has_weights:
        made[WEIGHT] = np.ones(ids.shape, np.float32)
        made[WEIGHT][:, 1:] = windows.weights(numbers)
    return made


def count_kept(corpus: Corpus, kept: Kept) -> int:
    total, start = 0, 0
    for tokens in columns(corpus, "tokens"):
        total += int(np.count_nonzero(kept.state[start : start + len(tokens)] == KEPT))
        start += len(tokens)
    return total
