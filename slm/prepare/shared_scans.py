"""The processes of one preparation share the reading of its files for their hashes.

    <out>/.scans/<key>.json    sealed: what was seen of some files, about GROUP_BYTES of them
                 <key>.claim   of who looks at them

A key tells files by path, size and time of writing, as `Scan.check_unchanged` does. So a run that
was interrupted reads none twice either. The folder goes when report.json is there.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from slm.console import progress
from slm.prepare import scan
from slm.prepare.places import State, state_of
from slm.prepare.scan import Cut, Scan
from slm.prepare.sources import Source
from slm.store.claims import claim
from slm.store.files import hash_json, read_json, write_record

SCANS = ".scans"
GROUP_BYTES = 2**30
POLL_S = 0.2

Seen = tuple[Source, str, State]  # a file of a source, before it is read
Group = list[Seen]


def share_scans(out: Path, sources: list[Source]) -> None:
    """Give each source its `scans`, together with others that do the same for `out`.

    Input of one unit is left alone: a source looks at its files itself.

    Raises:
        UserError: what another has written is damaged; a file cannot be reached.
    """
    seen = [(source, file, state_of(file)) for source in sources for file in source.files]
    total = sum(state.size for _, _, state in seen)
    if total <= scan.UNIT_BYTES:
        return
    scans: dict[int, dict[str, Scan]] = {id(source): {} for source in sources}
    left = {key_of(group): group for group in grouped(seen)}
    with progress("hashing", total, "bytes") as advance:
        while left:
            before = len(left)
            for key, group in list(left.items()):
                found = scanned(out / SCANS / f"{key}.json", group)
                if found is not None:
                    for source, one in found:
                        scans[id(source)][one.file] = one
                    advance(sum(state.size for _, _, state in left.pop(key)))
            if len(left) == before:
                time.sleep(POLL_S)
    for source in sources:  # a cached property is what the instance has by its name
        vars(source)["scans"] = {file: scans[id(source)][file] for file in source.files}


def grouped(seen: Iterable[Seen]) -> Iterator[Group]:
    group: Group = []
    size = 0
    for one in seen:
        group.append(one)
        size += one[2].size
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def key_of(group: Group) -> str:
    """What a scan depends on: the file as it is, and how its source is cut."""
    files = [[s.format, s.document, s.noise is None, f, *state] for s, f, state in group]
    return hash_json({"unit_bytes": scan.UNIT_BYTES, "files": files})


def scanned(path: Path, group: Group) -> list[tuple[Source, Scan]] | None:
    """None where another is at it."""
    try:
        return read_scans(path, group)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    with claim(path.with_suffix(".claim")) as mine:
        if mine is None:
            return None
        if path.exists():  # meanwhile
            return read_scans(path, group)
        scans = [scan.scan_file(file, source.cut_at(file)) for source, file, _ in group]
        rows = [[one.size, one.mark, one.sha256, one.cuts] for one in scans]
        write_record(path, {"scans": rows}, mine.publish)
        return [(source, one) for (source, _, _), one in zip(group, scans, strict=True)]


def read_scans(path: Path, group: Group) -> list[tuple[Source, Scan]]:
    rows = read_json(path)["scans"]
    return [
        (source, Scan(file, size, mark, sha256, tuple(Cut(*cut) for cut in cuts)))
        for (source, file, _), (size, mark, sha256, cuts) in zip(group, rows, strict=True)
    ]
