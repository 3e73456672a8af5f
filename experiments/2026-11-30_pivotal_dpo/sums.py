"""Sums of four numbers, a step after the other: texts for a base and for SFT, problems.

python sums.py OUT

base.jsonl      sums of two numbers, {"text": "15+8=23"}
sft.jsonl       sums of four, {"prompt": "7+8+5+9=", "text": "15+5+9=20+9=29"}
search.jsonl, tune.jsonl, test.jsonl      problems, {"question": "7+8+5+9=", "answer": 29}

No two files share a problem.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

SIZES = {"sft": 4_000, "search": 400, "tune": 300, "test": 1_000}


def chain(numbers: tuple[int, ...]) -> dict[str, str]:
    """Each step adds the first two."""
    steps, left = [], list(numbers)
    while len(left) > 1:
        left = [left[0] + left[1], *left[2:]]
        steps.append("+".join(map(str, left)))
    return {"prompt": "+".join(map(str, numbers)) + "=", "text": "=".join(steps)}


def problem(numbers: tuple[int, ...]) -> dict[str, Any]:
    return {"question": chain(numbers)["prompt"], "answer": sum(numbers)}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(out: Path) -> None:
    rng = random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    pairs = [(rng.randrange(28), rng.randrange(10)) for _ in range(40_000)]
    write(out / "base.jsonl", [{"text": f"{a}+{b}={a + b}"} for a, b in pairs])
    every = rng.sample(range(10_000), sum(SIZES.values()))
    left = [tuple(map(int, f"{n:04}")) for n in every]
    for name, size in SIZES.items():
        mine, left = left[:size], left[size:]
        write(out / f"{name}.jsonl", [(chain if name == "sft" else problem)(one) for one in mine])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
