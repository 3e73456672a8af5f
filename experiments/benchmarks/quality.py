"""How fast `slm quality features=hashed` scores documents: rows in results/quality.csv.

    python experiments/benchmarks/quality.py            30 MB of text, five times
    python experiments/benchmarks/quality.py --small    toy sizes, for the test suite

All of it: JSON lines are read and parsed, hashed, scored, the scores sorted and written. Time is
the process's CPU time, of its one thread; the text is prepare.py's, and the same in pieces of 600
bytes, as problems and posts are short.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from pipeline import Rows  # type: ignore

from prepare import write_text  # type: ignore
from slm.prepare.grams import BUCKETS
from slm.quality.command import quality
from slm.store.quality import CLASSIFIER, write_quality

TARGET, PIECE = 10, 600
RESULTS = Path(__file__).parent / "results" / "quality.csv"
ABOUT = {"kind": CLASSIFIER, "features": "hashed", "threshold": 3, "labels": {}}


def write_pieces(path: Path, source: Path) -> None:
    with open(path, "w") as file, open(source) as lines:
        for line in lines:
            text = json.loads(line)["text"]
            for start in range(0, len(text), PIECE):
                if piece := text[start : start + PIECE].strip():
                    file.write(json.dumps({"text": piece}) + "\n")


def size_of(path: Path) -> float:
    """MB of text."""
    with open(path) as lines:
        return sum(len(json.loads(line)["text"].encode(errors="replace")) for line in lines) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    arguments = parser.parse_args()
    rows, repeats = Rows(), 1 if arguments.small else 5
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        weights = np.random.default_rng(0).normal(size=BUCKETS + 1)
        write_quality(folder / "classifier", ABOUT, {"weights": weights})
        if arguments.small:
            files = sorted(Path(json.__file__).parent.glob("*.py"))
            lines = [json.dumps({"text": file.read_text()}) for file in files]
            (folder / "files.jsonl").write_text("\n".join(lines))
        else:
            write_text(folder / "files.jsonl", 30)
        write_pieces(folder / "pieces.jsonl", folder / "files.jsonl")
        for name, case in (("files", "documents as they are"), ("pieces", f"of {PIECE} bytes")):
            path, rates = folder / f"{name}.jsonl", []
            for number in range(repeats):
                start = time.process_time()
                out = folder / f"{name}{number}"
                quality(out, classifier=folder / "classifier", sources=[str(path)])
                seconds = time.process_time() - start
                rates.append(size_of(path) / seconds)
            rows.add("hashed", case, "MB per CPU s", rates, f">= {TARGET}")
    rows.write(arguments.out)


if __name__ == "__main__":
    main()
