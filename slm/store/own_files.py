"""Files of a command that is run again into one folder: it replaces its own and no others.

    <folder>/made.json   sha256 of every file that the command made there

New files are made in a hidden folder inside and take their places when all are there: a full disk
or a kill leaves the earlier ones. What somebody else made, or changed since, is never touched.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm.errors import UserError
from slm.store.claims import process_name, remove_temporaries
from slm.store.fields import OBJECT, TEXT, check_fields
from slm.store.files import (
    Advance,
    cannot_write,
    check_hash,
    hash_file,
    nothing,
    read_json,
    write_error,
    write_json,
)

log = logging.getLogger("slm.store.own_files")
RECORD = "made.json"
RESUMED = ("pivots", "pilot")  # kinds of plan.json: the commands keep their work beside the files

Hashes = dict[str, list[str]]  # path in the folder -> sha256 of what the command made there


@contextmanager
def replacing(folder: Path, by: str) -> Iterator[Path]:
    """Yields an empty folder, whose files then take the place of those that `by` made before."""
    is_new = not folder.exists()
    remove_temporaries(folder)
    new = folder / f".new.{process_name()}.tmp"
    new.mkdir(parents=True)
    try:
        with naming_last(folder, new):
            yield new
        publish(new, folder, by)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it has files
                folder.rmdir()


@contextmanager
def naming_last(folder: Path, new: Path) -> Iterator[None]:
    """All the new files need space at once, beside the earlier ones."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = write_error(error, new)
        if cause is None:
            raise
        last = max(files_in(new), key=lambda path: path.stat().st_mtime_ns, default=new)
        shutil.rmtree(new, ignore_errors=True)
        raise cannot_write(folder / last.relative_to(new), cause) from error


def check_own(folder: Path, names: Iterable[str], by: str) -> None:
    """Refuse to replace a file that is there and that the record does not have."""
    made = read_record(folder, by)
    there = [name for name in names if (folder / name).exists()]
    foreign = [name for name in there if not is_own(folder, name, made)]
    if foreign:
        more = f" and {len(foreign) - 1} other files" if len(foreign) > 1 else ""
        raise UserError(
            f"{folder / foreign[0]}{more} would be replaced, and {RECORD} there does not say that "
            f"{by} made it as it is: move it, or choose another folder than {folder}"
        )


def is_own(folder: Path, name: str, made: Hashes) -> bool:
    path = folder / name
    return name in made and path.is_file() and hash_file(path) in made[name]


def publish(new: Path, folder: Path, by: str) -> None:
    """The record has both hashes of a file until all are in place, in case of a kill."""
    made = {path.relative_to(new).as_posix(): [hash_file(path)] for path in files_in(new)}
    check_own(folder, made, by)
    before = read_record(folder, by)
    both = {name: [*before.get(name, []), *made.get(name, [])] for name in before | made}
    write_json(folder / RECORD, {"by": by, "files": both})
    for name in made:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, folder / name)
    for name in sorted(before.keys() - made.keys()):
        remove(folder, name, before)
    write_json(folder / RECORD, {"by": by, "files": made})


def remove(folder: Path, name: str, made: Hashes) -> None:
    path = folder / name
    if is_own(folder, name, made):
        path.unlink()
    elif path.exists():
        log.warning("%s was changed after it was made: it stays, and is out of date", path)


def read_record(folder: Path, by: str) -> Hashes:
    path = folder / RECORD
    if not path.exists():
        return {}
    record = read_json(path)
    if record.keys() != {"by", "files"} or record["by"] != by or not are_hashes(record["files"]):
        raise UserError(f"{path} is no list of the files that {by} made: choose another folder")
    return record["files"]


def resumed_by(folder: Path) -> str | None:
    """The command that goes on there, if plan.json is of one."""
    with suppress(UserError, OSError):
        plan = read_json(folder / "plan.json")
        return f"slm {plan['kind']}" if "kind" in plan and plan["kind"] in RESUMED else None


def check_made(folder: Path, advance: Advance = nothing) -> str:
    """Compare every file with what made.json says; returns the command that made them.

    Raises:
        UserError: one is missing or another, or the command was killed before all were there.
    """
    path = folder / RECORD
    if not path.exists():
        again = f"the same `{resumed_by(folder)}` command goes on"
        raise UserError(f"{folder} is unfinished: {RECORD} is missing; {again}")
    record = read_json(path)
    check_fields(path, record, {"by": TEXT, "files": OBJECT})
    by, made = record["by"], read_record(folder, record["by"])
    if any(len(hashes) != 1 for hashes in made.values()):
        raise UserError(f"{folder} is unfinished: {by} was replacing its files; run it again")
    for name, (expected,) in made.items():
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing: {by} made it; run it again")
        check_hash(folder / name, expected, RECORD, advance)
    return by


def are_hashes(value: object) -> bool:
    """Of files inside of the folder."""
    return isinstance(value, dict) and all(
        isinstance(hashes, list) and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name, hashes in value.items()
    )


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
