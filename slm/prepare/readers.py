"""From files to blocks: whole lines of a file, a whole file, or one row of a table.

A .json file that holds a list, or objects over several lines, becomes lines first.

`read_blocks` cuts sources into blocks. That is cheap and keeps the order; what is in a block,
`slm.prepare.records` finds out in the workers.

JSON, CSV and text files are read here and not by `datasets`, which cannot name the line of a
broken record; Parquet by row groups (parquet.py); Arrow and hub names stream through `datasets`.
Memory is a few blocks, or the longest record (`max_document_mb`).
"""

import bz2
import codecs
import csv
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from slm.errors import UserError
from slm.prepare.documents import Block
from slm.prepare.parquet import read_rows
from slm.prepare.places import bare_suffix, is_url, open_bytes, reaching
from slm.prepare.sources import Source

BLOCK_BYTES = 2**19
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CODECS = {".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".br": "brotli"}  # of Arrow
# JSON without parsing it: what ends a text, and what nests or separates outside of texts.
TEXT_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
MARK = re.compile(rb'["\[\]{},]')
HEAD_BYTES = 2**16  # of a JSON file, which tell how it is laid out
IN_LIST, IN_A_ROW = 1, 0  # how deep the records of a JSON file lie


def read_blocks(sources: list[Source], max_bytes: int) -> Iterator[Block]:
    """All sources one after the other, each as often as its weight asks for."""
    for index, source in enumerate(sources):
        for copy in range(source.num_copies):
            for block in read_source(source, max_bytes):
                yield block._replace(source=index, copy=copy)


class Span(NamedTuple):
    """A range of a file that begins and ends between records."""

    first: int  # byte
    last: int  # the byte behind it
    line: int  # lines of the file before it


def read_source(source: Source, max_bytes: int, span: Span | None = None) -> Iterator[Block]:
    """span: of the one file that there is; records are numbered from its beginning"""
    if source.format in ("jsonl", "text"):
        return read_files(source, max_bytes, span)
    if source.format == "csv":
        return read_csv(source, max_bytes)
    return read_tables(source, span)


def read_files(source: Source, max_bytes: int, span: Span | None) -> Iterator[Block]:
    record = 0
    for file in source.files:
        line = 0 if span is None else span.line
        with open_stream(file) as stream:
            if source.separator is None:
                data = stream.read(max_bytes + 1)
                kept = data if len(data) <= max_bytes else None
                yield Block(0, 0, file, 0, record, kept, len(data), None)
                record += 1
                continue
            unit, chunks = "line", read_chunks(stream, span)
            if source.format == "jsonl" and bare_suffix(Path(file)) == ".json":
                unit, chunks = read_json(chunks, file)
            for data, num_lines in cut(chunks, source.separator, max_bytes):
                yield Block(0, 0, file, line, record, data, len(data or b""), unit, num_lines)
                line += num_lines
                record += num_lines
        if line == 0:
            yield Block(0, 0, file, 0, record, b"", 0, None, count=0)


def read_chunks(stream: IO[bytes], span: Span | None) -> Iterator[bytes]:
    if span is None:
        yield from iter(partial(stream.read, BLOCK_BYTES), b"")
        return
    stream.seek(span.first)
    for start in range(span.first, span.last, BLOCK_BYTES):
        yield stream.read(min(BLOCK_BYTES, span.last - start))


@contextmanager
def open_stream(file: str) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file."""
    try:
        with reaching(file), open_bytes(file) as raw:
            with decompressed(Path(file).suffix, raw) as stream:
                yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is truncated or damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except MemoryError:
        raise out_of_memory(file) from None


def decompressed(suffix: str, raw: IO[bytes]) -> IO[bytes]:
    if suffix in OPENERS:
        return cast(IO[bytes], OPENERS[suffix](raw))
    if suffix in CODECS:
        import pyarrow  # here, not above: 0.3 s, and only these suffixes need it

        return cast(IO[bytes], pyarrow.input_stream(raw, compression=CODECS[suffix]))
    return raw


def out_of_memory(where: str) -> UserError:
    return UserError(
        f"{where}: memory ran out; a document takes some 30 bytes per byte of it "
        "(max_document_mb bounds it), in each worker (num_proc)"
    )


def cut(
    chunks: Iterator[bytes], separator: re.Pattern[bytes], max_bytes: int
) -> Iterator[tuple[bytes | None, int]]:
    """Pieces that end with a separator, and their lines; None for a record that is too long."""
    pending = bytearray()  # grows in place: a record may be of many chunks
    start = 0  # where a separator may begin that ends in the next chunk
    skipping, passed = False, 0  # passed: lines of a record that is being skipped
    for chunk in chunks:
        pending += chunk
        if skipping:
            found = next((match.end() for match in separator.finditer(pending)), None)
            # A separator may begin in this chunk and end in the next.
            end = max(0, len(pending) - 64) if found is None else found
            passed += pending.count(b"\n", 0, end)
            del pending[:end]
            if found is None:
                continue
            yield None, passed
            skipping, start = False, 0
        end = max((match.end() for match in separator.finditer(pending, start)), default=0)
        if end:
            yield bytes(memoryview(pending)[:end]), pending.count(b"\n", 0, end)
            del pending[:end]
            start = 0
        elif len(pending) > max_bytes:
            skipping, passed = True, 0
        newline = pending.rfind(b"\n", start)
        start = newline if newline >= 0 else len(pending)
    if skipping:
        yield None, passed + pending.count(b"\n") + 1
    elif pending:
        yield bytes(pending), pending.count(b"\n") + (not pending.endswith(b"\n"))


# ---- JSON that is no lines ----------------------------------------------------------------------


def read_json(chunks: Iterator[bytes], file: str) -> tuple[str, Iterator[bytes]]:
    """What a record of the file is, and the file as lines of one record each."""
    head, start = b"", b""
    for chunk in chunks:
        head += chunk
        start = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if b"\n" in start or len(head) >= HEAD_BYTES:
            break
    chunks = chain([head], chunks)
    depth = record_depth(start)
    if depth is None:
        return "line", chunks
    return ("element" if depth == IN_LIST else "record"), to_lines(chunks, depth, file)


def record_depth(head: bytes) -> int | None:
    """Is it a list, are objects spread over lines, or (None) has each a line?"""
    if head.startswith(b"["):
        return IN_LIST
    first, end, _ = head.partition(b"\n")
    outside = re.sub(rb'"' + TEXT_REST.pattern + rb'"', b"", first, flags=re.DOTALL)
    opened = outside.count(b"{") - outside.count(b"}")
    return IN_A_ROW if end and opened > 0 and b'"' not in outside else None


def to_lines(chunks: Iterator[bytes], record_depth: int, file: str) -> Iterator[bytes]:
    """One record a line; other line ends become \\r, which JSON allows between texts only."""
    depth, in_text, rest, ended = 0, False, b"", False
    for chunk in chunks:
        data, at, start, pieces = (rest + chunk).replace(b"\n", b"\r"), 0, 0, []
        while True:
            if in_text:
                at = cast(re.Match[bytes], TEXT_REST.match(data, at)).end()
                if data[at : at + 1] != b'"':  # the text goes on, or a \\ is the last byte
                    break
                in_text, at = False, at + 1
            mark = MARK.search(data, at)
            if mark is None:
                at = len(data)
                break
            at, sign = mark.end(), mark[0]
            if ended:
                raise UserError(f"{file}: its list ends, and {sign.decode()} follows")
            in_text = sign == b'"'
            depth += (sign in b"[{") - (sign in b"]}")
            opens, closes = sign == b"[" and depth == 1, sign == b"]" and depth == 0
            if record_depth == IN_LIST and (opens or closes or (sign == b"," and depth == 1)):
                pieces += [data[start : mark.start()], b"" if opens else b"\n"]
                start, ended = at, closes
            elif record_depth == IN_A_ROW and sign == b"}" and depth == 0:
                pieces += [data[start:at], b"\n"]
                start = at
        rest = data[at:]
        yield b"".join([*pieces, data[start:at]])
    if record_depth == IN_LIST and not ended:
        raise UserError(f"{file} ends inside its list, it is cut off")


# ---- tables -------------------------------------------------------------------------------------


def read_csv(source: Source, max_bytes: int) -> Iterator[Block]:
    """Rows of .csv and .tsv files as texts, by the names in the first row."""
    csv.field_size_limit(max(max_bytes, csv.field_size_limit()))
    record = 0
    for file in source.files:
        delimiter = "\t" if bare_suffix(Path(file)) == ".tsv" else ","
        with open_stream(file) as stream:
            # What is not UTF-8 is found in its record.
            text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
            rows = csv_rows(csv.reader(text, delimiter=delimiter, strict=True), file)
            names = next(rows, None)
            if names is None:
                yield Block(0, 0, file, 0, record, "is empty", 0, None, count=0)
                continue
            if isinstance(names, str):
                raise UserError(f"{file}: its first row {names}")
            for line, row in enumerate(rows):
                data = to_record(names, row, source)
                yield Block(0, 0, file, line, record, data, sum(map(len, row)), "row")
                record += 1


def csv_rows(reader: Any, file: str) -> Iterator[list[str] | str]:
    """Rows that hold something, or what is wrong with one: the next begins on the next line."""
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):  # whether it ends on this line, nobody knows
                raise UserError(f"{file}, line {reader.line_num}: {error}") from None
            row = f"has quotes that do not match (lines {first} to {reader.line_num}): {error}"
        if row:
            yield row


def to_record(names: list[str], row: list[str] | str, source: Source) -> dict[str, Any] | str:
    if isinstance(row, str):
        return row
    if len(row) != len(names):
        return f"has {len(row)} fields, the first row has {len(names)}"
    record: dict[str, Any] = dict(zip(names, row, strict=True))
    known = record.keys() >= set(source.columns)
    return {name: record[name] for name in source.columns} if known else record


def read_tables(source: Source, span: Span | None) -> Iterator[Block]:
    """Rows a file at a time, so that a bad row's file has a name."""
    record = 0
    for file in source.files or (source.path,):
        before = 0 if span is None else span.line
        for line, row in enumerate(table_rows(source, file, span), before):
            yield Block(0, 0, file, line, record, row, row_size(row), "row")
            record += 1


def table_rows(source: Source, file: str, span: Span | None) -> Iterator[dict[str, Any]]:
    if source.format == "parquet":
        whole = (0, None) if span is None else (span.first, span.last)
        yield from read_rows(file, source.columns, *whole)
        return
    try:
        yield from open_table(source, file)
    # Whatever Arrow, fsspec or the hub's client raise, the user needs the name and the reason.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read as {source.format}: {reason}") from None


def open_table(source: Source, file: str) -> Any:
    import datasets  # here, not above: it takes a second, and JSON lines and text do without it

    if source.format == "hub":
        table = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    else:
        name = file if is_url(file) else glob.escape(file)
        table = datasets.load_dataset("arrow", data_files=name, split="train", streaming=True)
    if table.column_names is not None and set(source.columns) <= set(table.column_names):
        table = table.select_columns(source.columns)
    return table


def row_size(value: Any) -> int:
    """Characters of all the text in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(row_size, value.values()))
    return sum(map(row_size, value)) if isinstance(value, list) else 8
