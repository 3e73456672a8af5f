"""`slm prepare` beside its older build and `datasets.map`: rows in results/prepare.csv.

    python experiments/benchmarks/prepare.py             160 MB, three rounds: ten minutes
    python experiments/benchmarks/prepare.py --older REV   another commit of this repository
    python experiments/benchmarks/prepare.py --small       toy sizes, no older build: for the tests

The text is every .py, .rst, .md and .txt file that this Python can import from, each once, as JSON
lines. All make windows of one tokenizer's ids on the same cores, each as a process from its start
to its end; `datasets` tokenizes, groups and saves, as language-model scripts do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline import Rows, in_turn, prepare_command, ratios  # type: ignore

OLDER = "dd15f1c"  # the last before any work on its speed
SEQ_LEN, VOCAB_SIZE = 1024, 32768
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "prepare.csv"
PEER = """
import os, sys
from datasets import load_dataset
from transformers import AutoTokenizer

source, folder, out, seq_len, num_proc = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)

def tokenize(rows):
    texts = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)
    return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in texts["input_ids"]]}

def group(rows):
    joined = [token for ids in rows["input_ids"] for token in ids]
    size = int(seq_len)
    return {"input_ids": [joined[i : i + size] for i in range(0, len(joined) - size + 1, size)]}

data = load_dataset("json", data_files=source, split="train")
data = data.map(tokenize, batched=True, num_proc=int(num_proc), remove_columns=["text"])
data.map(group, batched=True, num_proc=int(num_proc)).save_to_disk(out)
"""


def write_text(path: Path, size_mb: float) -> float:
    """MB of text that were there: files of this Python, none twice."""
    written, seen = 0, set()
    places = (folder for path in sys.path if path for folder in os.walk(path))
    files = (Path(root) / name for root, _, names in places for name in sorted(names))
    with open(path, "w") as lines:
        for file in files:
            if file.suffix not in (".py", ".rst", ".md", ".txt") or written >= size_mb * 1e6:
                continue
            text = file.read_text(errors="replace")
            if len(text) > 200 and hash(text) not in seen:
                seen.add(hash(text))
                lines.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode(errors="replace"))
    return written / 1e6


def run(line: list[str], place: Path, **more: str) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    done = subprocess.run(line, cwd=place, env=os.environ | more, **quiet)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--older", default=OLDER, help="commit of the older build")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        compare(Path(place), None if arguments.small else arguments.older, arguments.out)


def compare(folder: Path, older: str | None, out: Path) -> None:
    """older: None is a toy comparison."""
    source, cores = folder / "text.jsonl", len(os.sched_getaffinity(0))
    size = write_text(source, 0.3 if older is None else 160)
    more = "300" if older is None else str(VOCAB_SIZE)
    first = [f"tokenizer.vocab_size={more}", "heldout_ratio=0", f"num_proc={cores}"]
    run(prepare_command(source, folder / "first", *first), folder)
    tokenizer = folder / "first" / "train" / "tokenizer"
    words = [f"tokenizer.path='{tokenizer}'", "heldout_ratio=0", f"num_proc={cores}"]
    words.append(f"seq_len={SEQ_LEN}" if older is not None else "seq_len=128")
    counter = iter(range(1000))

    def ours(**more: str) -> None:
        run(prepare_command(source, folder / f"out{next(counter)}", *words), folder, **more)

    def datasets() -> None:
        number = next(counter)
        line = [str(source), str(tokenizer), f"{folder}/out{number}", str(SEQ_LEN), str(cores)]
        cache = {"HF_DATASETS_CACHE": f"{folder}/cache{number}", "TOKENIZERS_PARALLELISM": "false"}
        run([sys.executable, "-c", PEER, *line], folder, **cache)

    ways = {"slm prepare": ours, "datasets.map": datasets}
    tree = folder / "older"
    if older is not None:
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), older], cwd=ROOT, check=True
        )
        ways["older build"] = lambda: ours(PYTHONPATH=f"{tree}{os.pathsep}{tree / 'kernels'}")
    seconds = in_turn(1 if older is None else 3, **ways)
    if older is not None:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    rows = Rows()
    for name, values in seconds.items():
        rows.add("prepare", f"{name}, {size:.0f} MB", "s", values, "")
    for name, target in (("older build", ">= 6"), ("datasets.map", ">= 7")):
        if name in seconds:
            rows.add(
                "prepare",
                f"{name} / slm prepare",
                "1",
                ratios(seconds[name], seconds["slm prepare"]),
                target,
            )
    rows.write(out)


if __name__ == "__main__":
    main()
