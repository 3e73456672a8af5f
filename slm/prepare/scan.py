"""A file is looked at once before it is read: its size, its hash, and where it may be cut.

A unit of the work is about UNIT_BYTES of the input: what a kill loses at most, of each process.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slm.errors import UserError
from slm.store.files import hash_file

UNIT_BYTES = 2**27
READ_BYTES = 2**22


class BadText(UserError):
    """Of the text or the settings: the same run would end here every time."""


class Cut(NamedTuple):
    """A place where a record ends."""

    position: int  # bytes of the file before it
    line: int  # lines before it


@dataclass(frozen=True)
class Scan:
    file: str
    size: int
    mtime_ns: int
    sha256: str
    cuts: tuple[Cut, ...]  # about UNIT_BYTES from one to the next

    def check_unchanged(self) -> None:
        """Raise BadText where the file holds something else by now."""
        now = os.stat(self.file)
        if (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns):
            return
        if (found := hash_file(Path(self.file))) != self.sha256:
            raise BadText(changed(self.file, [self.size, self.sha256], [now.st_size, found]))


def changed(file: str, before: list[Any], now: list[Any]) -> str:
    """[size, sha256] each."""
    (old_size, old), (size, sha256) = before, now
    return (
        f"{file} has changed since the run began: {old_size:,} bytes with sha256 {old} then, "
        f"{size:,} bytes with sha256 {sha256} now; bring it back, or choose another output folder"
    )


def scan_file(file: str, separator: re.Pattern[bytes] | None) -> Scan:
    """separator: between the file's records; None where it cannot be cut"""
    digest, cuts, position, lines = hashlib.sha256(), [], 0, 0
    with open(file, "rb") as stream:
        stat = os.fstat(stream.fileno())
        while block := stream.read(min(READ_BYTES, UNIT_BYTES)):
            digest.update(block)
            if separator is not None and stat.st_size > UNIT_BYTES:
                goal = UNIT_BYTES + (cuts[-1].position if cuts else 0)
                match = separator.search(block, max(0, min(len(block), goal - position)))
                if match is not None and position + match.end() < stat.st_size:
                    line = lines + block.count(b"\n", 0, match.end())
                    cuts.append(Cut(position + match.end(), line))
                lines += block.count(b"\n")
            position += len(block)
    return Scan(file, position, stat.st_mtime_ns, digest.hexdigest(), tuple(cuts))


def identify(scans: Iterable[Scan]) -> dict[str, Any]:
    """Number, size and hash of names and content, about a second a gigabyte; no path is in it."""
    digest, total, count = hashlib.sha256(), 0, 0
    for scan in scans:
        digest.update(f"{Path(scan.file).name}\0{scan.size}\0{scan.sha256}\0".encode())
        total, count = total + scan.size, count + 1
    return {"num_files": count, "num_bytes": total, "files_sha256": digest.hexdigest()}
