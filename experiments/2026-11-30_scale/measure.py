"""What one rank holds and waits for at 1e7, 1e8 and 1e9 windows: a CSV row each.

    python measure.py make FOLDER WINDOWS          corpus and references, sparse: no token is stored
    python measure.py rank FOLDER [ORDER [NOTE]]   open them, read steps of 512 windows on 64 ranks
    python measure.py report FOLDER RUNS SEEDS     runs' records, and `slm report` of them
    python measure.py order                        the keyed order against numpy's permutation

Every row is of a process of its own, with at most 1,024 open files, and names its machine.
"""

import csv
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SEQ_LEN, PER_SHARD = 1024, 10_000  # windows of a shard
BATCH, RANKS, STEPS = 512, 64, 50


def status(field: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most, RssAnon without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def add(what: str, windows: int, **values: Any) -> None:
    path = HERE / "results.csv"
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(["what", "windows", "measure", "value", "machine"])
        for name, value in values.items():
            text = f"{value:.4g}" if isinstance(value, float) else value
            writer.writerow([what, windows, name, text, machine()])
            print(f"{what:24} {windows:>13,} {name:28} {text}")


@contextmanager
def timed(into: dict[str, Any], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into[name] = time.perf_counter() - start


# ---- a store of any size ------------------------------------------------------------------------


def sparse(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """A .npy of zeros that takes one block of the disk."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        file.truncate(file.tell() + size)


def make(folder: Path, windows: int) -> None:
    """Sidecars come without hashes of their own: nothing here reads what the files hold."""
    from slm.store.files import hash_json, write_json
    from slm.store.shards import FORMAT, fingerprint

    shards, tokens = windows // PER_SHARD, PER_SHARD * SEQ_LEN + 1
    identity = {"tokenizer_sha256": "", "vocab_size": 32000, "seq_len": SEQ_LEN}
    identity |= {"packing": "concat", "format": FORMAT}
    columns: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "corpus": {"tokens": ("uint16", (tokens,)), "bytes": ("uint8", (tokens,))},
        "references": {"logprobs": ("float32", (tokens,))},
    }
    columns["corpus"]["documents"] = ("int64", (10_000, 4))
    plans: dict[str, Any] = {
        "corpus": {"kind": "corpus", "eos_id": 0, "sources": ["zeros"], "tokenizer_files": {}}
    }
    for name, kinds in columns.items():
        place = folder / str(windows) / name
        (place / "tokenizer").mkdir(parents=True)
        records = []
        for index in range(shards):
            for column, (dtype, shape) in kinds.items():
                sparse(place / f"{column}-{index:05d}.npy", dtype, shape)
            records.append(
                {
                    "index": index,
                    "num_tokens": tokens,
                    "sha256": {column: hash_json([column, index]) for column in kinds},
                    "dtype": {column: dtype for column, (dtype, _) in kinds.items()},
                    "rows": {column: shape[0] for column, (_, shape) in kinds.items()},
                }
            )
        manifest = identity | plans[name] | {"shards": records}
        manifest["fingerprint"] = fingerprint(manifest)
        write_json(place / "manifest.json", manifest)
        plans["references"] = {
            "kind": "reference",
            "corpus_fingerprint": manifest["fingerprint"],
            "model_sha256": None,
            "scoring": {},
        }


# ---- what a rank does ---------------------------------------------------------------------------


def rank(folder: Path, kind: str = "keyed", note: str = "") -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    from slm.store.shards import Corpus, References
    from slm.store.windows import Windows
    from slm.train.order import Order, Steps

    windows_there, found = int(folder.name), {"rss_before_mb": status("VmRSS")}
    with timed(found, "open_corpus_s"):
        corpus = Corpus.open(folder / "corpus")
    with timed(found, "open_references_s"):
        references = References.open(folder / "references")
    found["peak_open_mb"] = status("VmHWM")
    with timed(found, "windows_s"):
        windows = Windows(corpus, [references], partial=True)
        steps = Steps(windows, Order(len(windows), 0, kind), BATCH, BATCH // RANKS, 5, RANKS)
    with timed(found, "first_step_s"):
        steps._read(0)
    for name in ("step_ms_cold", "step_ms_warm"):  # of the page cache
        start = time.perf_counter()
        for step in range(1, STEPS + 1):
            steps._read(step)
        found[name] = (time.perf_counter() - start) / STEPS * 1000
    found["anonymous_mb"], found["peak_mb"] = status("RssAnon"), status("VmHWM")
    found["maps"] = len(Path("/proc/self/maps").read_text().splitlines())
    found["files"] = len([*Path("/proc/self/fd").iterdir()])
    add(f"rank, {kind}{note}", windows_there, **found)


def order() -> None:
    from slm.train.order import ORDERS

    for size in (10**7, 10**8):
        for kind, begin in ORDERS.items():
            start = time.perf_counter()
            places = begin(size, 0, 0)
            for first in range(0, size, 1 << 20):
                places(np.arange(first, min(first + (1 << 20), size)))
            seconds = time.perf_counter() - start
            add(f"order, {kind}", size, ns_per_window=seconds / size * 1e9)
    for size in (10**7, 10**8, 10**9):
        places, start = ORDERS["keyed"](size, 0, 0), time.perf_counter()
        for step in range(200):
            places(np.arange(step * BATCH, (step + 1) * BATCH))
        us = (time.perf_counter() - start) / 200 * 1e6
        add("order, keyed", size, us_per_step_of_512=us)


# ---- reports ------------------------------------------------------------------------------------


def record(folder: Path, ratio: float, seed: int, loss: float) -> None:
    """What a finished run of a sweep leaves, without its model."""
    from slm.store.files import write_csv, write_json

    rule = {"rule": "excess", "select_ratio": ratio, "scope": "batch"}
    lineage: dict[str, Any] = {"selection": rule, "seed": seed, "corpus_fingerprint": "c"}
    lineage |= {"tokens_seen": 400, "tokens_selected": round(400 * ratio), "references": []}
    lineage |= {"needs_references": True, "online_reference": None, "heldout": {}}
    lineage |= {"train_seconds": None, "train_flops": None}
    (folder / "model").mkdir(parents=True)
    write_json(folder / "model" / "slm.json", {"lineage": lineage})
    flat = {f"selection.{key}": value for key, value in rule.items()}
    write_json(folder / "run.json", {"seed": seed, "corpus": "c"} | flat)
    rows = [(0, 0, 9.0), (1, 200, 5.0), (2, 400, loss)]
    keys = ("step", "tokens_seen", "heldout/a/loss")
    write_csv(folder / "heldout.csv", [dict(zip(keys, row, strict=True)) for row in rows])


def many_runs(folder: Path, runs: int, seeds: int) -> None:
    from slm.report.command import report

    for run in range(runs):
        arm, seed = divmod(run, seeds)
        ratio = round((arm + 1) / (runs // seeds + 1), 5)
        record(folder / f"{runs}" / f"{run}", ratio, seed, 3 + 0.01 * arm + 0.001 * seed)
    found: dict[str, Any] = {}
    with timed(found, f"report_s_of_{runs}_runs"):
        report([str(folder / f"{runs}")], out=str(folder / f"{runs}-report"))
    add(f"report, {seeds} seeds", 0, **found, peak_mb=status("VmHWM"))


if __name__ == "__main__":
    does: dict[str, Callable[[], None]] = {
        "make": lambda: make(Path(sys.argv[2]), int(sys.argv[3])),
        "rank": lambda: rank(Path(sys.argv[2]), *sys.argv[3:]),
        "report": lambda: many_runs(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])),
        "order": order,
    }
    does[sys.argv[1]]()
