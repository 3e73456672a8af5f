"""What the processes of one preparation share, and the hidden folder through which they do.

    <out>/.parts/inputs.json         sealed: what the units are made of
                 <process>.process   a claim of each process that is at work here
                 tokenizer/          what was trained, by one of them (slm.prepare.vocabulary)
                 part-00000.json     a unit's part, written last; .npy beside it (slm.prepare.parts)
                 part-00000.claim    of who makes it
                 train-00000.claim   of who writes a shard (slm.prepare.join)
                 join.claim          of who begins the corpora, and who ends them

The folder goes when report.json is there.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.errors import UserError, shown
from slm.prepare import scan
from slm.prepare.encoder import EncoderState
from slm.prepare.overlap import Exclusion
from slm.prepare.proof import choose_encoder
from slm.prepare.report import SIDES
from slm.prepare.settings import count_workers, input_bytes
from slm.prepare.shared_scans import POLL_S, SCANS
from slm.prepare.sources import Source
from slm.prepare.tally import COUNTERS, COUNTS
from slm.prepare.units import Unit
from slm.prepare.workers import Job
from slm.store.claims import Claim, claim, owner_of, process_name
from slm.store.files import Json, read_json, write_record

PARTS = ".parts"
SAID_AFTER_S = 2.0

log = logging.getLogger("slm.prepare")


@dataclass
class Work:
    config: Any
    out: Path
    job: Job
    units: list[Unit]
    exclusion: Exclusion | None
    tokenizer: Any

    @property
    def parts(self) -> Path:
        return self.out / PARTS

    @property
    def sides(self) -> list[int]:
        ratio = self.job.heldout_ratio
        return [side for side, share in enumerate((1 - ratio, ratio)) if share > 0]

    @property
    def num_proc(self) -> int:
        asked = self.config.num_proc
        return count_workers(self.job.sources) if asked is None else asked

    @property
    def num_bytes(self) -> int | None:
        return input_bytes(self.job.sources)

    def chosen_encoder(self) -> EncoderState:
        """A proof takes a second: only who has something to encode asks for it."""
        job, asked = self.job, self.config.tokenizer.encoder
        return choose_encoder(asked, job.encoder, job.sources, job.max_bytes, self.num_bytes)


# ---- together in one folder ---------------------------------------------------------------------


@contextmanager
def when_free(path: Path, said: str = "waiting for") -> Iterator[Claim]:
    """The claim on `path`, as soon as no other process has it."""
    waits = 0
    while True:
        with claim(path) as mine:
            if mine is not None:
                yield mine
                return
        waits += 1
        if waits == round(SAID_AFTER_S / POLL_S):
            log.info("%s: %s %s", path, said, owner_of(path))
        time.sleep(POLL_S)


@contextmanager
def present(parts: Path) -> Iterator[None]:
    """Others see that this process is at work."""
    with claim(parts / f"{process_name()}.process"):
        yield


def is_alone(parts: Path) -> bool:
    """Is no other process at work? Claims of dead ones go."""
    for path in parts.glob("*.process"):
        if path.stem != process_name():
            with claim(path) as mine:
                if mine is None:
                    return False
    return True


def adopt_inputs(parts: Path, sources: list[Source]) -> None:
    """What the units are made of is what it was; which file is another is said by name."""
    path = parts / "inputs.json"
    files = [
        [source.name, Path(seen.file).name, seen.size, seen.sha256]
        for source in sources
        for seen in source.scans.values()
    ]
    cuts = sum(len(seen.cuts) for source in sources for seen in source.scans.values())
    now: Json = {"unit_bytes": scan.UNIT_BYTES, "cuts": cuts, "files": files}
    now["counts"] = [*COUNTS, *COUNTERS]
    if not path.exists():
        parts.mkdir(exist_ok=True)
        write_record(path, now)
        return
    found = read_json(path)
    names = (seen.file for source in sources for seen in source.scans.values())
    for name, before, after in zip(names, found["files"], files, strict=False):
        if before[:2] == after[:2] and before != after:
            raise UserError(scan.changed(name, before[2:], after[2:]))
    for key in ("unit_bytes", "cuts", "counts"):
        if key not in found or found[key] != now[key]:
            raise UserError(
                f"{parts}/inputs.json: {key} is {shown(found.get(key))}, this release cuts or "
                f"counts the input otherwise, {now[key]}; remove the folder"
            )


def remove_corpora(out: Path) -> None:
    """What an interrupted or failed run has left of its result."""
    for side in SIDES:
        shutil.rmtree(out / side, ignore_errors=True)
    (out / "excluded.jsonl").unlink(missing_ok=True)


def remove_parts(out: Path, folders: Sequence[str] = (PARTS, SCANS)) -> None:
    """At once for others, who would begin anew where they saw a half of them."""
    for name in folders:
        gone = out / f"{name}.{process_name()}.tmp"
        with suppress(FileNotFoundError):  # another process did it, or there are none
            os.replace(out / name, gone)
            shutil.rmtree(gone, ignore_errors=True)
