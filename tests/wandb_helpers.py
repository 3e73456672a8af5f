"""What an offline W&B run has on disk, read back without its library's help."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from wandb.proto import wandb_internal_pb2


def wandb_records(folder: Path) -> list[Any]:
    """The records of all offline runs in a folder, once they are complete: finish() is early."""
    paths, end = sorted(folder.glob("wandb/offline-run-*/run-*.wandb")), time.monotonic() + 10
    while time.monotonic() < end:
        runs = [list(read_records(path.read_bytes())) for path in paths]
        if all(run and run[-1].WhichOneof("record_type") == "exit" for run in runs):
            return [record for run in runs for record in run]
        time.sleep(0.02)
    raise AssertionError(f"no exit record in {paths}")


def read_records(data: bytes) -> Iterator[Any]:
    """The records of one file.

    A file is a 7-byte header, then a log in blocks of 32 KiB: pieces of checksum (4 bytes), length
    (2), kind (1: whole, 2 first, 3 middle, 4 last) and data; what is left of a block below 7 bytes
    is padding.
    """
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = cast(Any, wandb_internal_pb2).Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    rows = [
        r.history.item for r in wandb_records(folder) if r.WhichOneof("record_type") == "history"
    ]
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row} for row in rows
    ]


def wandb_summary(folder: Path) -> dict[str, Any]:
    """The last value of each key of the summary."""
    found = [r.summary for r in wandb_records(folder) if r.WhichOneof("record_type") == "summary"]
    updates = [update for summary in found for update in summary.update]
    return {"/".join(u.nested_key) or u.key: json.loads(u.value_json) for u in updates}


def media_file(folder: Path, row: dict[str, Any], name: str) -> str:
    """The file that a row of the history names, under the run's files/."""
    (path,) = folder.glob(f"wandb/offline-run-*/files/{row[f'{name}/path']}")
    return path.read_text(encoding="utf-8")
