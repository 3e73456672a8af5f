"""The texts: GSM8K hidden in encyclopedia text, MATH beside it; where the problems stand is known.

python texts.py DATA OUT

    general.jsonl   three paragraphs of WikiText-2's test part a document; into every other one a
                    problem is put between two of them, until as many are hidden so as stand alone
    domain.jsonl    GSM8K problems with their answers, a document each
    near.jsonl      MATH problems with their solutions
    curated.jsonl   other GSM8K problems: for the domain's reference, and for learning it again

`domain` of a record has the characters of the problem: [start, end), or none.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARAGRAPHS = 3


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def general(paragraphs: list[str], hidden: list[str]) -> Iterable[dict[str, Any]]:
    problems = iter(hidden)
    for number, start in enumerate(range(0, len(paragraphs), PARAGRAPHS)):
        parts = paragraphs[start : start + PARAGRAPHS]
        problem = next(problems, None) if number % 2 and len(parts) > 1 else None
        if problem is None:
            yield {"text": "\n".join(parts), "domain": []}
            continue
        place = 1 + number // 2 % (len(parts) - 1)
        before = "\n".join(parts[:place]) + "\n"
        text = before + problem + "\n" + "\n".join(parts[place:])
        yield {"text": text, "domain": [len(before), len(before) + len(problem)]}


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    text = (data / "general" / "wikitext2_test.txt").read_text()
    paragraphs = [one.strip() for one in text.split("\n") if len(one.strip()) > 80]
    gsm = [
        f"{row['question']}\n{row['answer']}" for row in rows(data / "curated/gsm8k_train.jsonl")
    ]
    math = [
        f"{row['problem']}\n{row['solution']}"
        for row in rows(data / "curated/math_train_4500.jsonl")
    ]
    hidden, curated = gsm[::16], [one for number, one in enumerate(gsm) if number % 3 == 1]
    curated = [one for one in curated if one not in hidden]
    alone, within = hidden[::2], hidden[1::2]
    made = list(general(paragraphs, within))
    assert sum(bool(one["domain"]) for one in made) == len(within), "too few documents"
    write(out / "general.jsonl", made)
    write(out / "domain.jsonl", [{"text": one, "domain": [0, len(one)]} for one in alone])
    write(out / "near.jsonl", [{"text": one, "domain": []} for one in math[::6]])
    write(out / "curated.jsonl", [{"text": one} for one in curated])


if __name__ == "__main__":
    main()
