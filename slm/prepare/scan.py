"""A file is looked at once before it is read: its size, its hash, and where it may be cut.

A unit of the work is about UNIT_BYTES of the input: what a kill loses at most, of each process.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slm.errors import UserError
from slm.prepare.places import open_bytes, state_of

UNIT_BYTES = 2**27
READ_BYTES = 2**22


class BadText(UserError):
    """Of the text or the settings: the same run would end here every time."""


class Cut(NamedTuple):
    """A place where a record ends."""

    position: int  # bytes of the file before it; of a table, of its rows
    line: int  # lines or rows before it


@dataclass(frozen=True)
class Scan:
    file: str
    size: int
    mark: str | int  # of places.State
    sha256: str
    cuts: tuple[Cut, ...]  # about UNIT_BYTES from one to the next

    def check_unchanged(self) -> None:
        """Raise BadText where the file holds something else by now."""
        if state_of(self.file) == (self.size, self.mark):
            return
        now = scan_file(self.file, None)
        if now.sha256 != self.sha256:
            raise BadText(changed(self.file, [self.size, self.sha256], [now.size, now.sha256]))


def changed(file: str, before: list[Any], now: list[Any]) -> str:
    """[size, sha256] each."""
    (old_size, old), (size, sha256) = before, now
    return (
        f"{file} has changed since the run began: {old_size:,} bytes with sha256 {old} then, "
        f"{size:,} bytes with sha256 {sha256} now; bring it back, or choose another output folder"
    )


def scan_file(file: str, cut_at: re.Pattern[bytes] | Callable[[str], Sequence[Cut]] | None) -> Scan:
    """cut_at: what stands between the file's records, or tells all places where it may be cut;
    None where it cannot be"""
    digest, cuts, position, lines = hashlib.sha256(), [], 0, 0
    state = state_of(file)
    separator = cut_at if isinstance(cut_at, re.Pattern) else None
    with open_bytes(file) as stream:
        while block := stream.read(min(READ_BYTES, UNIT_BYTES)):
            digest.update(block)
            if separator is not None and state.size > UNIT_BYTES:
                goal = UNIT_BYTES + (cuts[-1].position if cuts else 0)
                match = separator.search(block, max(0, min(len(block), goal - position)))
                if match is not None and position + match.end() < state.size:
                    line = lines + block.count(b"\n", 0, match.end())
                    cuts.append(Cut(position + match.end(), line))
                lines += block.count(b"\n")
            position += len(block)
    if callable(cut_at) and position > UNIT_BYTES:
        cuts = far_apart(cut_at(file))
    return Scan(file, position, state.mark, digest.hexdigest(), tuple(cuts))


def far_apart(places: Iterable[Cut]) -> list[Cut]:
    """Of ascending places, some that are UNIT_BYTES from one to the next at least."""
    cuts: list[Cut] = []
    for place in places:
        if place.position - (cuts[-1].position if cuts else 0) >= UNIT_BYTES:
            cuts.append(place)
    return cuts


def identify(scans: Iterable[Scan]) -> dict[str, Any]:
    """Number, size and hash of names and content, about a second a gigabyte; no path is in it."""
    digest, total, count = hashlib.sha256(), 0, 0
    for scan in scans:
        digest.update(f"{Path(scan.file).name}\0{scan.size}\0{scan.sha256}\0".encode())
        total, count = total + scan.size, count + 1
    return {"num_files": count, "num_bytes": total, "files_sha256": digest.hexdigest()}
