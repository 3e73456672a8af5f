"""Generated texts and what is said of them; `slm speak` writes them, `slm report` shows them.

A row of the JSON lines is a text: `model`, `prompt`, `text`, `num_tokens`, `ended` (with an EOS),
and of a comparison with a corpus `copied_tokens`, `longest_copied_tokens` and the text of that run,
`longest_copied`. `summary` counts words (runs of letters and digits), whatever the tokenizer:

    distinct_1, _2, _3  different n-grams of words / all of them, over all texts (Li et al. 2016)
    repetition          share of a text's 4-grams of words that stood in it before, the texts' mean
                        (Welleck et al. 2020, seq-rep-4)
    ended               share of the texts that end by themselves
    copied              share of the tokens within a run of 8 or more that stands in the corpus

The first three fall as texts grow longer and more: compare texts of the same prompts and budget.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from slm.errors import UserError
from slm.prepare.overlap import WORD
from slm.store.fields import TEXT, Field, check_fields, whole_number
from slm.store.files import Json, atomic_file

REPEATED = 4
FLAG = Field("true or false", lambda value: isinstance(value, bool))
FIELDS = {"model": TEXT, "prompt": TEXT, "text": TEXT, "num_tokens": whole_number(0), "ended": FLAG}
COPIED = {"copied_tokens": whole_number(0), "longest_copied_tokens": whole_number(0)}
COPIED |= {"longest_copied": TEXT}


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


def distinct(texts: Sequence[Sequence[str]], size: int) -> float | None:
    """texts: words of each. None where no text has an n-gram."""
    found = [gram for words in texts for gram in ngrams(words, size)]
    return len(set(found)) / len(found) if found else None


def repetition(words: Sequence[str]) -> float | None:
    found = distinct([words], REPEATED)
    return None if found is None else 1 - found


def summary(rows: Sequence[Json]) -> Json:
    """The numbers of all texts; None where there is nothing to count."""
    texts = [words_of(row["text"]) for row in rows]
    repeated = [value for words in texts if (value := repetition(words)) is not None]
    tokens = sum(row["num_tokens"] for row in rows)
    found: Json = {"texts": len(rows), "mean_tokens": tokens / len(rows)}
    found["ended"] = sum(row["ended"] for row in rows) / len(rows)
    found |= {f"distinct_{size}": distinct(texts, size) for size in (1, 2, 3)}
    found["repetition"] = sum(repeated) / len(repeated) if repeated else None
    compared = tokens > 0 and "copied_tokens" in rows[0]
    copied = sum(row["copied_tokens"] for row in rows) / tokens if compared else None
    longest = max(row["longest_copied_tokens"] for row in rows) if compared else None
    return found | {"copied": copied, "longest_copied_tokens": longest}


def summaries(rows: Sequence[Json]) -> list[Json]:
    """One of each model, in the order of the rows."""
    names = dict.fromkeys(row["model"] for row in rows)
    return [
        {"model": name} | summary([row for row in rows if row["model"] == name]) for name in names
    ]


def write_speech(path: Path, rows: Sequence[Json]) -> None:
    with atomic_file(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def read_speech(path: Path) -> list[Json]:
    """Rows as `write_speech` wrote them."""
    if not path.is_file():
        raise UserError(f"{path} is no file: it must be what slm speak wrote")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = Path(f"{path}:{number}")
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: {row!r} is no text of slm speak")
            check_fields(where, row, FIELDS | (COPIED if "copied_tokens" in row else {}))
            rows.append(row)
    if not rows:
        raise UserError(f"{path} has no text")
    return rows
