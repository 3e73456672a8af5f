"""Labels of an annotator, 0 to 5, beside the documents that they are of: lines of JSON.

    {"id": "<hash of the text>", "label": 4, "source": "books", "text": "..."}

`slm annotate` writes such a file and `slm quality` reads `label` and `text` of it, so labels of any
other origin are read as well.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from slm.errors import UserError
from slm.store.fields import TEXT, Field, check_fields
from slm.store.files import Json, atomic_file

LOWEST, HIGHEST = 0, 5
LABEL = Field(
    f"a whole number from {LOWEST} to {HIGHEST}",
    lambda value: type(value) is int and LOWEST <= value <= HIGHEST,
)


class Labelled(NamedTuple):
    texts: list[str]
    labels: list[int]


def write_labels(path: Path, rows: Iterable[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def read_labels(paths: Iterable[Path]) -> Labelled:
    """Of all files; one text with two labels is refused."""
    found: dict[str, tuple[int, str]] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"labels: {path} is no file")
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    take(found, line, f"{path} line {number}")
    if not found:
        raise UserError(f"labels: {', '.join(map(str, paths))} has no label")
    return Labelled([*found], [label for label, _ in found.values()])


def take(found: dict[str, tuple[int, str]], line: bytes, where: str) -> None:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error})") from None
    check_fields(Path(where), row if isinstance(row, dict) else {}, {"label": LABEL, "text": TEXT})
    text, label = row["text"], row["label"]
    if text in found and found[text][0] != label:
        before, place = found[text]
        raise UserError(f"{where}: label is {label}, {place} has {before} for the same text")
    found.setdefault(text, (label, where))
