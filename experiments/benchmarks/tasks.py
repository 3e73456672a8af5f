"""`slm prepare` by one task and by two, a core each, in one folder: rows in results/tasks.csv.

    python experiments/benchmarks/tasks.py                        512 MB, three rounds: ten minutes
    python experiments/benchmarks/tasks.py --encoder gigatoken    4 GB, likewise; 12 GB on the disk
    python experiments/benchmarks/tasks.py --small                toy sizes: for the tests

Each task is the whole command, from its start to its end; two share the units by claims, and they
join the parts together. What each does by itself (imports, hashes, the encoder's proof) takes some
seconds, so that a fast encoder wants more text. It is that of prepare.py, the same in each file.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from pipeline import Rows, in_turn, prepare_command, ratios  # type: ignore

from prepare import SEQ_LEN, VOCAB_SIZE, run, write_text  # type: ignore

RESULTS = Path(__file__).parent / "results" / "tasks.csv"
FILES = {"tokenizers": 4, "gigatoken": 32}  # of 128 MB, a unit each


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--encoder", choices=FILES, default="tokenizers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        compare(Path(place), arguments.small, arguments.encoder, arguments.rounds, arguments.out)


def compare(folder: Path, is_small: bool, encoder: str, rounds: int, out: Path) -> None:
    count = 4 if is_small else FILES[encoder]
    (folder / "text").mkdir()
    size = write_text(folder / "text" / "0.jsonl", 0.3 if is_small else 128)
    vocabulary = f"tokenizer.vocab_size={300 if is_small else VOCAB_SIZE}"
    first = folder / "text" / "0.jsonl"
    run(prepare_command(first, folder / "first", vocabulary, "heldout_ratio=0"), folder)
    for number in range(1, count):
        shutil.copy(first, folder / "text" / f"{number}.jsonl")
    words = [f"tokenizer.path='{folder / 'first' / 'train' / 'tokenizer'}'", "num_proc=1"]
    words += [f"seq_len={128 if is_small else SEQ_LEN}", "heldout_ratio=0"]
    words.append(f"tokenizer.encoder={encoder}")
    ways = {f"{n} task{'s' * (n > 1)}": partial(together, n, folder, words) for n in (1, 2)}
    seconds = in_turn(rounds, **ways)
    rows = Rows()
    for name, values in seconds.items():
        rows.add("tasks", f"{encoder}, {name}, {size * count:.0f} MB", "s", values, "")
    found = ratios(seconds["1 task"], seconds["2 tasks"])
    rows.add("tasks", f"{encoder}, 1 task / 2 tasks", "1", found, ">= 1.8")
    rows.write(out)


def together(count: int, folder: Path, words: list[str]) -> None:
    out = folder / "out"
    line = prepare_command(folder / "text", out, *words)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tasks = [subprocess.Popen(line, cwd=folder, env=os.environ, **quiet) for _ in range(count)]
    codes = [task.wait() for task in tasks]
    assert codes == [0] * count, codes
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
