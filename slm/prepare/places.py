"""Which files a source names, here or behind a URL that fsspec knows, and how one is opened.

    texts/  a.jsonl  'texts/**/*.md'  s3://bucket/texts  hf://datasets/owner/name/*.parquet  memory://a

A URL's files are read as those of a disk are: once for their hash, and then in pieces.
"""

import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from slm.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ("jsonl", "text", "csv", "parquet", "arrow", "hub")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".lz4")
ARCHIVES = (".zip", ".tgz", ".tbz2", ".txz", ".7z", ".rar")  # and .tar, compressed or not


# ---- one file -----------------------------------------------------------------------------------


class State(NamedTuple):
    """Of a file, without reading it."""

    size: int  # bytes
    mark: str | int  # another one where the file was written since


def is_url(name: str) -> bool:
    return "://" in name


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Whatever a client of a store raises, or fsspec where none is installed, is one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_url(url):
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{url} cannot be reached: {reason}") from None


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs  # here, not above: files of a disk do without it

    return url_to_fs(url)


def open_bytes(file: str) -> IO[bytes]:
    if not is_url(file):
        return open(file, "rb")
    with reaching(file):
        system, path = file_system(file)
        return system.open(path, "rb")


def state_of(file: str) -> State:
    if not is_url(file):
        stat = os.stat(file)
        return State(stat.st_size, stat.st_mtime_ns)
    with reaching(file):
        system, path = file_system(file)
        system.invalidate_cache()
        return State(system.size(path), system.ukey(path))


# ---- the files of a source ----------------------------------------------------------------------


def find_urls(given: str, kind: str | None) -> tuple[list[str], str]:
    """`find_files` of a URL: a file, a folder, or a glob."""
    with reaching(given):
        system, root = file_system(given)
        if system.isdir(root):
            inside = [p for p in system.find(root) if not is_hidden(Path(p.removeprefix(root)))]
            known = [p for p in inside if format_of(Path(p)) is not None]
            found = [p for p in known if kind in (None, format_of(Path(p)))]
        elif system.isfile(root):
            found = [root]
        else:
            named = (p for p in system.glob(root) if not Path(p).name.startswith("."))
            found = [path for path in named if system.isfile(path)]
        files = [str(system.unstrip_protocol(path)) for path in sorted(found)]
    return files, one_format(given, [Path(file) for file in files], kind)


def bare_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def format_of(path: Path) -> str | None:
    suffix = bare_suffix(path)
    return SUFFIXES[suffix] if suffix in SUFFIXES else None


def find_files(given: str, kind: str | None) -> tuple[list[Path], str]:
    """The files of a path, sorted, and their format."""
    path = Path(given).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        inside = (p for p in path.rglob("*") if not is_hidden(p.relative_to(path)))
        here = sorted(p for p in inside if p.is_file())
        found = without_leftovers([p for p in here if format_of(p) is not None])
        say_archives([p for p in here if is_archive(p)])
        files = [p for p in found if kind in (None, format_of(p))]
        say_unknown(
            given, kind, [p for p in here if format_of(p) is None and not is_archive(p)], files
        )
    elif kind == "hub" or (kind is None and looks_like_hub(given)):
        return [], "hub"
    else:
        matches = map(Path, glob.glob(str(path), recursive=True))
        files = without_leftovers([p for p in matches if p.is_file()])
    return files, one_format(given, files, kind)


def one_format(given: str, files: list[Path], kind: str | None) -> str:
    """That of all files, where it is not given."""
    if archives := sorted(file for file in files if is_archive(file)):
        raise UserError(f"{archives[0]} is an archive, its files are not read: unpack it")
    if not files:
        wanted = "" if kind is None else f" of format {kind}"
        raise UserError(f"{given}: there is no such file, folder or glob with files{wanted}")
    kinds = sorted({str(format_of(file)) for file in files}) if kind is None else [kind]
    if kinds == ["None"]:
        raise UserError(
            f"{files[0]}: its suffix tells no format; set format ({', '.join(FORMATS)})"
        )
    if len(kinds) > 1:
        raise UserError(f"{given} holds files of several formats ({', '.join(kinds)}); set format")
    return kinds[0]


def is_archive(path: Path) -> bool:
    return path.suffix in ARCHIVES or bare_suffix(path) == ".tar"


def say_archives(archives: list[Path]) -> None:
    if archives:
        more = f" and {len(archives) - 1} more archives are" if archives[1:] else " is"
        log.warning("%s%s not read: unpack what belongs to the data", archives[0], more)


def say_unknown(given: str, kind: str | None, unknown: list[Path], files: list[Path]) -> None:
    """A folder of notes.md is no empty folder."""
    if not unknown:
        return
    suffixes = Counter(p.suffix for p in unknown)
    most = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))[:3]
    counts = ", ".join(f"{count} {suffix or 'without one'}" for suffix, count in most)
    how = f"{given}/**/*{most[0][0]}"
    words = (
        f"{given}: {len(unknown)} files are not read, their suffix tells no format ({counts}); "
        f"a glob with a format reads them: {{path: {how!r}, format: text}}"
    )
    if not files and kind in (None, "text"):
        raise UserError(words)
    log.warning("%s", words)


def is_hidden(path: Path) -> bool:
    """Below the folder that was named: .ipynb_checkpoints, .git, ._a.jsonl of a Mac's archive."""
    return any(part.startswith(".") for part in path.parts)


def without_leftovers(files: list[Path]) -> list[Path]:
    """Sorted, of what `datasets` wrote the data alone: a cache holds the same documents again."""
    own = {folder: dataset_files(folder) for folder in {file.parent for file in files}}
    dicts = {folder.parent / "dataset_dict.json" for folder, data in own.items() if data}
    meant = (f for f in files if f not in dicts)
    return sorted(f for f in meant if (data := own[f.parent]) is None or f in data)


def dataset_files(folder: Path) -> set[Path] | None:
    """The data of a folder that `datasets` has saved or cached; None where it is neither."""
    arrow = set(folder.glob("*.arrow"))
    if not arrow or not (folder / "dataset_info.json").is_file():
        return None
    if not (folder / "state.json").is_file():
        return {file for file in arrow if not file.name.startswith("cache-")}
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        named = {folder / row["filename"] for row in state["_data_files"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{folder / 'state.json'} names no _data_files: it is damaged") from None
    if lost := sorted(named - arrow):
        raise UserError(f"{folder / 'state.json'} names {lost[0].name}, which is not there")
    return named


def looks_like_hub(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and format_of(Path(path)) is None
