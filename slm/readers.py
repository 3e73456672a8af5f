"""From files to blocks: whole lines of a file, a whole file, or one row of a table.

`read_blocks` cuts sources into blocks. That is cheap and keeps the order; what is in a block,
`slm.records` finds out in the workers.

JSON lines and text files are read here and not by `datasets`, which cannot name the line of a
broken record; Parquet, Arrow and hub names stream through `datasets`. Memory is a few blocks, or
the longest record (`max_document_mb`).
"""

import glob
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from slm.errors import UserError
from slm.records import BLANK_LINE, LINE_END
from slm.sources import Source

BLOCK_BYTES = 2**19
ROWS_AT_ONCE = 256  # what a table reader holds in memory


class Block(NamedTuple):
    """A piece of one file. `data` is whole lines, a whole file, a row, or None: too long."""

    source: int  # index in the list of sources
    copy: int  # the how manieth reading of the source, from 0
    file: str
    line: int  # lines (rows) of the file before it
    record: int  # lines (rows, files) of the source before it
    data: bytes | dict[str, Any] | None
    size: int  # bytes of input


def read_blocks(sources: list[Source], max_bytes: int) -> Iterator[Block]:
    """All sources one after the other, each as often as its weight asks for."""
    for index, source in enumerate(sources):
        for copy in range(source.num_copies):
            for block in read_source(source, max_bytes):
                yield block._replace(source=index, copy=copy)


def read_source(source: Source, max_bytes: int) -> Iterator[Block]:
    if source.format in ("jsonl", "text"):
        return read_files(source, max_bytes)
    return read_tables(source)


def read_files(source: Source, max_bytes: int) -> Iterator[Block]:
    whole_file = source.format == "text" and source.document == "file"
    separator = BLANK_LINE if source.document == "paragraph" else LINE_END
    record = 0
    for file in source.files:
        line = 0
        with open_stream(Path(file)) as stream:
            if whole_file:
                data = stream.read(max_bytes + 1)
                kept = data if len(data) <= max_bytes else None
                yield Block(0, 0, file, 0, record, kept, len(data))
                record += 1
                continue
            for data, num_lines in cut(stream, separator, max_bytes):
                yield Block(0, 0, file, line, record, data, len(data or b""))
                line += num_lines
                record += num_lines
        if line == 0:
            yield Block(0, 0, file, 0, record, b"", 0)


@contextmanager
def open_stream(file: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file."""
    try:
        if file.suffix == ".gz":
            stream = gzip.open(file)
        elif file.suffix == ".zst":
            import pyarrow  # here, not above: 0.3 s, and only this suffix needs it

            stream = pyarrow.input_stream(str(file), compression="zstd")
        else:
            stream = open(file, "rb")
        with stream:
            yield cast(IO[bytes], stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is truncated or damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def cut(
    stream: IO[bytes], separator: re.Pattern[bytes], max_bytes: int
) -> Iterator[tuple[bytes | None, int]]:
    """Pieces that end with a separator, and their lines; None for a record that is too long."""
    pending, passed = b"", 0  # passed: lines of a record that is being skipped
    skipping = False
    while chunk := stream.read(BLOCK_BYTES):
        pending += chunk
        if skipping:
            match = separator.search(pending)
            # A separator may begin in this chunk and end in the next.
            end = match.end() if match else max(0, len(pending) - 64)
            passed += pending.count(b"\n", 0, end)
            pending = pending[end:]
            if match is None:
                continue
            yield None, passed
            skipping = False
        end = max((match.end() for match in separator.finditer(pending)), default=0)
        if end:
            yield pending[:end], pending.count(b"\n", 0, end)
            pending = pending[end:]
        elif len(pending) > max_bytes:
            skipping, passed = True, 0
    if skipping:
        yield None, passed + pending.count(b"\n") + 1
    elif pending:
        yield pending, pending.count(b"\n") + (not pending.endswith(b"\n"))


def read_tables(source: Source) -> Iterator[Block]:
    """Rows through `datasets`, a file at a time so that a bad row's file has a name."""
    record = 0
    for file in source.files or (source.path,):
        try:
            for line, row in enumerate(open_table(source, file)):
                yield Block(0, 0, file, line, record, row, row_size(row))
                record += 1
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
        settings: dict[str, Any] = {}
        if source.format == "parquet":
            settings["batch_size"] = ROWS_AT_ONCE
        table = datasets.load_dataset(
            source.format, data_files=glob.escape(file), split="train", streaming=True, **settings
        )
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
