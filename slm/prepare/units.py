"""Units of the work: some files, or a range of a long one, about UNIT_BYTES (slm.prepare.scan).

They are a pure function of the input, in its order. Where all of it is less than that there is one
unit. What cannot be cut is a piece of its own: a file that is compressed, a table or a JSON list;
a name on the hub; a source with injected noise, which is drawn by a record's number in the source.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from slm.prepare import scan
from slm.prepare.documents import Block
from slm.prepare.readers import Span, read_source
from slm.prepare.sources import Source


class Piece(NamedTuple):
    """Of one reading of one source."""

    source: int
    copy: int
    files: tuple[str, ...]  # none of a name on the hub
    span: Span | None  # of the one file; None: the whole
    size: int  # bytes of input
    is_alone: bool  # shares its unit with no other, since its size is not known


Unit = list[Piece]


def list_units(sources: list[Source]) -> list[Unit]:
    """In the order of the input. Where there are several, none has two readings of a source."""
    pieces = [
        piece
        for index, source in enumerate(sources)
        for copy in range(source.num_copies)
        for piece in cut_source(index, copy, source)
    ]
    if len(pieces) == 1 or small(pieces):
        return [pieces]
    units: list[Unit] = []
    for piece in pieces:
        if not units or not fits(piece, units[-1]):
            units.append([])
        units[-1].append(piece)
    return units


def small(pieces: Unit) -> bool:
    return not any(p.is_alone for p in pieces) and sum(p.size for p in pieces) <= scan.UNIT_BYTES


def fits(piece: Piece, unit: Unit) -> bool:
    last = unit[-1]
    again = piece.source == last.source and piece.copy != last.copy
    return not again and small([*unit, piece])


def cut_source(index: int, copy: int, source: Source) -> Iterator[Piece]:
    if source.format == "hub":
        yield Piece(index, copy, (), None, 0, True)
        return
    if source.noise is not None:
        size = sum(one.size for one in source.scans.values())
        yield Piece(index, copy, source.files, None, size, False)
        return
    for file, seen in source.scans.items():
        if not seen.cuts:
            yield Piece(index, copy, (file,), None, seen.size, False)
            continue
        starts = [scan.Cut(0, 0), *seen.cuts]
        ends = [*(cut.position for cut in seen.cuts), seen.size]
        for start, end in zip(starts, ends, strict=True):
            span = Span(start.position, end, start.line)
            yield Piece(index, copy, (file,), span, end - start.position, False)


def read_unit(
    unit: Unit, sources: list[Source], max_bytes: int, records: Counter[int]
) -> Iterator[Block]:
    """Blocks whose records are numbered from the first of their reading in the unit.

    records: is told how many records each source has here
    """
    reading = None
    for piece in unit:
        source = sources[piece.source]
        if (piece.source, piece.copy) != reading:
            reading, records[piece.source] = (piece.source, piece.copy), 0
        for file in piece.files:
            source.scans[file].check_unchanged()
        before = records[piece.source]
        part = replace(source, files=piece.files)
        for block in read_source(part, max_bytes, piece.span):
            records[piece.source] = before + block.record + block.count
            yield block._replace(source=piece.source, copy=piece.copy, record=before + block.record)
        for file in piece.files:
            source.scans[file].check_unchanged()
