"""Speed and size of everything around the model: rows in results/pipeline.csv.

    python experiments/benchmarks/pipeline.py            all, about fifteen minutes on two cores
    python experiments/benchmarks/pipeline.py data help  some of them
    python experiments/benchmarks/pipeline.py --small    toy sizes, for the test suite

What is compared is timed in turn within one loop, so that both see the same machine. Each row names
the machine and the versions, and gives the median with the lowest and the highest of the repeats.
Targets: see CONTRIBUTING.md.
"""

import argparse
import csv
import math
import os
import platform
import random
import re
import shutil
import statistics
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import transformers

TOY_MB = 0.08
RESULTS = Path(__file__).parent / "results" / "pipeline.csv"
FIELDS: tuple[str, ...] = (
    "benchmark", "case", "unit", "median", "low", "high", "repeats", "target", "machine", "cores",
    "python", "torch", "lightning", "transformers", "date",
)  # fmt: skip


def machine() -> dict[str, Any]:
    return {
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


class Rows:
    """Collects rows, prints each, appends them to the CSV."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, benchmark: str, case: str, unit: str, values: list[float], target: str) -> None:
        row = {"benchmark": benchmark, "case": case, "unit": unit, "target": target}
        row |= {"median": statistics.median(values), "low": min(values), "high": max(values)}
        row |= {"repeats": len(values)} | machine()
        self.rows.append(row)
        spread = f"{row['low']:.4g} to {row['high']:.4g}"
        print(
            f"{benchmark:9} {case:44} {row['median']:>10.4g} {unit:12} ({spread}) {target}",
            flush=True,
        )

    def write(self, path: Path) -> None:
        """Append what was collected since the last time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(self.rows)
        self.rows.clear()


def timed(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    function()
    return clock() - start


def in_turn(
    repeats: int, before: Callable[[], Any] = bool, **functions: Callable[[], Any]
) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times, one after the other in every round.

    before: each, and not timed
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            before()
            seconds[name].append(timed(function))
    return seconds


def ratios(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- inputs -----------------------------------------------------------------------------------


def write_source_text(path: Path, size_mb: float) -> None:
    """JSON lines of the standard library's sources, repeated until the size is there."""
    import json

    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [file.read_text(errors="replace") for file in sorted(root.glob("*.py"))]
    written, index = 0, 0
    with open(path, "w") as file:
        while written < size_mb * 1e6:
            line = json.dumps({"text": f"# copy {index}\n{texts[index % len(texts)]}"}) + "\n"
            written += file.write(line)
            index += 1


def write_unlike_text(path: Path, size_mb: float) -> None:
    """JSON lines of documents that are all unlike: of such sources some lines in any order, with
    words that stand nowhere else, so that whatever keeps words would grow."""
    import json

    root, rng = Path(sysconfig.get_paths()["stdlib"]), random.Random(0)
    texts = [file.read_text(errors="replace") for file in sorted(root.glob("*.py"))]
    lines, written = [line for text in texts for line in text.splitlines()], 0
    with open(path, "w") as file:
        while written < size_mb * 1e6:
            own = rng.choices(lines, k=rng.randint(20, 400))
            own[::8] = ["".join(rng.choices(string.ascii_lowercase, k=9)) for _ in own[::8]]
            written += file.write(json.dumps({"text": "\n".join(own)}) + "\n")


def prepare_command(source: Path, out: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "slm.prepare",
        f"sources=[{{path: '{source}', text: '{{text}}'}}]",
        f"out='{out}'",
        "seq_len=128",
        *words,
    ]


def make_corpus(folder: Path, size_mb: float) -> Path:
    write_source_text(folder / "corpus.jsonl", size_mb)
    words = ("tokenizer.vocab_size=4096", "heldout_ratio=0")
    subprocess.run(prepare_command(folder / "corpus.jsonl", folder / "corpus", *words), check=True)
    return folder / "corpus" / "train"


# ---- benchmarks -------------------------------------------------------------------------------


def bench_prepare(rows: Rows, folder: Path, small: bool) -> None:
    """`slm prepare` against the tokenizer's own encode_batch_fast on the same text and cores."""
    corpus = make_corpus(folder, TOY_MB if small else 10)
    rates = prepare_rates(folder, corpus, TOY_MB if small else 40, 1 if small else 5)
    rows.add("prepare", "encode_batch_fast alone", "MB/s", rates["bare"], "")
    rows.add("prepare", "slm prepare, start-up left out", "MB/s", rates["prepare"], "")
    rows.add("prepare", "ratio", "1", ratios(rates["prepare"], rates["bare"]), ">= 0.85")
    add_long_input(rows, folder, corpus, 2 * TOY_MB if small else 160, 1 if small else 3)
    source = folder / "memory.jsonl"
    for size in (TOY_MB,) if small else (10, 100, 1000, 2000):
        write_unlike_text(source, size)
        words = (f"tokenizer.path='{corpus / 'tokenizer'}'", "heldout_ratio=0")
        peak = peak_mb(prepare_command(source, folder / f"m{size}", *words))
        rows.add("prepare", f"peak memory, {size} MB of input", "MB", [peak], "flat")
        shutil.rmtree(folder / f"m{size}")


def add_long_input(rows: Rows, folder: Path, corpus: Path, size_mb: float, repeats: int) -> None:
    """Where the start of the worker processes, nearly a second, no longer shows."""
    rates = prepare_rates(folder, corpus, size_mb, repeats)
    values = ratios(rates["prepare"], rates["bare"])
    rows.add("prepare", f"ratio, {size_mb} MB of input", "1", values, ">= 0.85")


def prepare_rates(
    folder: Path, corpus: Path, size_mb: float, repeats: int
) -> dict[str, list[float]]:
    """MB/s of the tokenizer alone and of `slm prepare`, in turn."""
    from tokenizers import Tokenizer

    source = folder / f"speed{size_mb}.jsonl"
    write_source_text(source, size_mb)
    texts = read_texts(source)
    actual_mb = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))

    def bare() -> None:
        for start in range(0, len(texts), 256):
            tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)

    rates: dict[str, list[float]] = {"bare": [], "prepare": []}
    for index in range(repeats):
        out = folder / f"p{size_mb}-{index}"
        rates["bare"].append(actual_mb / timed(bare))
        rates["prepare"].append(prepare_rate(source, out, corpus))
    return rates


def read_texts(path: Path) -> list[str]:
    import json

    with open(path) as file:
        return [json.loads(line)["text"] for line in file]


def prepare_rate(source: Path, out: Path, corpus: Path) -> float:
    """MB/s as `slm prepare` itself prints it: the start of the process left out."""
    words = (f"tokenizer.path='{corpus / 'tokenizer'}'", "heldout_ratio=0")
    done = subprocess.run(prepare_command(source, out, *words), check=True, capture_output=True)
    rate = re.search(rb"MB of text in [0-9.]+ s: ([0-9.]+) MB/s", done.stdout + done.stderr)
    assert rate is not None, done.stderr
    return float(rate[1])


# A forked process begins with the largest resident set of its parent: a small one starts it.
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(done.returncode)
"""


def peak_mb(command: list[str]) -> float:
    """Largest resident set of the command and of any of its children."""
    words = [sys.executable, "-c", MEASURE, *command]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout)


def bench_import(rows: Rows, folder: Path, small: bool) -> None:
    """A file of tokens by link, start-up included, beside the hash of the same file."""
    from slm.store.files import hash_file
    from slm.store.shards import Corpus

    corpus = Corpus.open(make_corpus(folder, TOY_MB if small else 10))
    source, tokens = folder / "tokens.bin", corpus.column("tokens", 0).tobytes()
    with open(source, "wb") as file:
        for _ in range(1 if small else math.ceil(10e9 / len(tokens))):
            file.write(tokens)

    def link() -> None:
        out = folder / f"linked{len(peaks)}"
        words = ["format=nanogpt", f"path='{source}'", f"out='{out}'", "link=true"]
        words += [f"tokenizer.path='{corpus.tokenizer_folder}'", "seq_len=128"]
        peaks.append(peak_mb([sys.executable, "-m", "slm.import", *words]))

    peaks: list[float] = []
    seconds = in_turn(1 if small else 3, link=link, sha256=lambda: hash_file(source))
    rows.add("import", "link=true, 10 GB of tokens", "s", seconds["link"], "< 10")
    rows.add("import", "sha256 of the same file, one thread", "s", seconds["sha256"], "")
    rows.add("import", "its peak memory", "MB", peaks, "< 200")


def bench_data(rows: Rows, folder: Path, small: bool) -> None:
    """Tokens/s that the datamodule supplies on one core, page cache warm."""
    from slm.store.windows import Windows
    from slm.train.order import MicroBatches, Order, Steps

    for seq_len, target in ((2048, ">= 50e6"), (128, ">= 10e6")):
        corpus, references = random_store(folder / str(seq_len), seq_len, 1 if small else 32)
        windows = Windows(corpus, [references])
        batch_size = 65536 // seq_len
        steps = Steps(windows, Order(len(windows), 0), batch_size, batch_size)
        count = 10 if small else 200

        def supply(steps: Steps = steps, count: int = count) -> None:
            stream = iter(MicroBatches(steps, 0, 0, pin_memory=False))
            for _ in range(count):
                next(stream)

        with one_thread():
            supply()
            seconds = in_turn(2 if small else 7, supply=supply)["supply"]
        rates = [count * batch_size * seq_len / value for value in seconds]
        rows.add("data", f"windows of {seq_len}, with references", "tokens/s", rates, target)


def bench_mixture(rows: Rows, folder: Path, small: bool) -> None:
    """Process time in which the loader supplies 8 corpora by shares, and one of as many windows."""
    from slm.store.windows import Windows
    from slm.train.mixture import Mixture
    from slm.train.order import MicroBatches, Order, Steps

    seq_len, million, parts = 2048, 1 if small else 32, 8
    corpus, references = random_store(folder / "one", seq_len, million)
    windows, batch_size = Windows(corpus, [references]), 32
    parted: dict[str, dict[str, Any]] = {}
    for number in range(parts):
        stores = random_store(folder / f"{number}", seq_len, million / parts)
        places = zip(("corpus", "references"), (str(store.folder) for store in stores), strict=True)
        parted[f"part{number}"] = {**dict(places), "share": 1 / parts}
    mixture = Mixture.open(parted, "size")
    count = 10 if small else 400
    orders = {"one": (windows, Order(len(windows), 0)), "mixed": (mixture.windows, None)}

    def supply(name: str) -> None:
        of, order = orders[name]
        steps = Steps(of, order or mixture.order(0, "keyed"), batch_size, batch_size)
        stream = iter(MicroBatches(steps, 0, 0, pin_memory=False))
        for _ in range(count):
            next(stream)

    seconds: dict[str, list[float]] = {name: [] for name in orders}
    with one_thread():
        for number in range(1 + (2 if small else 15)):
            for name in orders:
                spent = timed(partial(supply, name), time.process_time)
                seconds[name] += [spent] * (number > 0)  # the first reads what was just written
    for name, case in (("one", "one corpus"), ("mixed", f"mixture of {parts} corpora")):
        steps = [value / count * 1e3 for value in seconds[name]]
        rows.add("mixture", f"{case}, CPU time of 65,536 tokens", "ms", steps, "")
    against = ratios(seconds["mixed"], seconds["one"])
    rows.add("mixture", f"mixture of {parts} corpora / one corpus", "ratio", against, "<= 1.1")


def random_store(folder: Path, seq_len: int, million_tokens: float) -> tuple[Any, Any]:
    """A corpus of random ids with random scores; four shards."""
    from slm.store.files import write_array, write_json
    from slm.store.shards import FORMAT, Corpus, References, write_manifest
    from slm.store.sidecars import Shard, shard_path, write_sidecar

    generator = np.random.default_rng(0)
    length = int(million_tokens * 250_000) // seq_len * seq_len + 1
    identity = {
        "tokenizer_sha256": "",
        "vocab_size": 32000,
        "seq_len": seq_len,
        "packing": "concat",
    }

    def write(
        name: str, kind: str, column: str, make: Callable[[], np.ndarray], **more: Any
    ) -> Path:
        path = folder / name
        path.mkdir(parents=True)
        (path / "tokenizer").mkdir()  # of no files: nothing is decoded
        write_json(path / "plan.json", {"format": FORMAT, "kind": kind} | identity | more)
        for index in range(4):
            array = make()
            digest = write_array(shard_path(path, column, index), array)
            about = {column: digest}, {column: str(array.dtype)}, {column: len(array)}
            write_sidecar(path, column, Shard(index, len(array), *about))
        write_manifest(path, column, 4)
        return path

    tokens = write("corpus", "corpus", "tokens",
                   lambda: generator.integers(0, 32000, length, dtype=np.uint16),
                   eos_id=0, sources=["random"])  # fmt: skip
    corpus = Corpus.open(tokens)
    scores = write("references", "reference", "logprobs",
                   lambda: -generator.random(length, dtype=np.float32),
                   corpus_fingerprint=corpus.fingerprint, model_sha256=None,
                   scoring={})  # fmt: skip
    return corpus, References.open(scores)


def small_lm(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from slm.model.build import SelectiveLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=128, intermediate_size=352,
                         num_hidden_layers=3, num_attention_heads=4,
                         tie_word_embeddings=True)  # fmt: skip
    return SelectiveLM(LlamaForCausalLM(config))


def bench_score(rows: Rows, folder: Path, small: bool) -> None:
    """`slm score`'s inner loop against a bare forward pass that keeps no logits."""
    from slm.score.command import ModelScores
    from slm.score.scorer import Scorer
    from slm.store.shards import Corpus
    from slm.store.windows import Windows

    corpus = Corpus.open(make_corpus(folder, TOY_MB if small else 3))
    lm = small_lm(corpus.vocab_size).eval()
    total = corpus.num_targets
    counter = iter(range(1000))

    def score() -> None:
        out = folder / f"scores{next(counter)}"
        out.mkdir()
        source = ModelScores(lm, Windows(corpus))
        Scorer(source, corpus, out, 32, "float32").run(lambda count: None)

    def bare() -> None:
        windows = Windows(corpus)
        weight = lm.model.get_output_embeddings().weight
        with torch.no_grad():
            for start in range(0, len(windows), 32):
                batch = windows.batch(np.arange(start, min(start + 32, len(windows))))
                hidden = lm.hidden(batch).flatten(0, 1)
                for rows_ in hidden.split(1024):
                    torch.logsumexp(rows_ @ weight.T, 1)

    bare()
    seconds = in_turn(1 if small else 5, bare=bare, score=score)
    for name, values in seconds.items():
        rows.add("score", name, "tokens/s", [total / value for value in values], "")
    rows.add(
        "score", "score / bare forward", "1", ratios(seconds["bare"], seconds["score"]), ">= 0.9"
    )


def bench_train(rows: Rows, folder: Path, small: bool) -> None:
    """A whole `slm train` step of the demo's model against the bare model, loss and optimizer."""
    import json

    from slm.store.shards import Corpus
    from slm.train.optim import adamw

    corpus_folder = make_corpus(folder, TOY_MB if small else 3)
    corpus = Corpus.open(corpus_folder)
    steps = 3 if small else 60
    ours, bare = [], []
    for repeat in range(1 if small else 5):
        bare += [bare_step_s(small_lm(corpus.vocab_size), adamw, corpus, steps)]
        out = folder / f"run{repeat}"
        words = [f"data.corpus='{corpus_folder}'", f"out='{out}'", f"max_tokens={steps * 4096}",
                 "selection=random", "logger=default"]  # fmt: skip
        subprocess.run(
            [sys.executable, "-c", STEP_TIMES, *words, f"+times='{out}.json'"], check=True
        )
        times = json.loads(Path(f"{out}.json").read_text())
        ours.append(statistics.median(times[len(times) // 5 :]))
    rows.add("train", "bare model, loss, AdamW", "s/step", bare, "")
    rows.add("train", "slm train, CSV and W&B offline", "s/step", ours, "")
    added = [ratio - 1 for ratio in ratios(ours, bare)]
    rows.add("train", "share added by the trainer", "1", added, "< 0.05")


# Runs `slm train` with a clock in the place of the progress bar, the last of the callbacks.
STEP_TIMES = """
import json, sys, time
from pathlib import Path
from lightning import Callback
times = next(word for word in sys.argv if word.startswith("+times=")); sys.argv.remove(times)
import slm.train.__main__, slm.train.build
class Clock(Callback):
    marks = []
    def on_train_batch_end(self, *_): self.marks.append(time.perf_counter())
slm.train.build.StepProgress = Clock
slm.train.__main__.main()
gaps = [b - a for a, b in zip(Clock.marks, Clock.marks[1:])]
Path(times.removeprefix("+times=").strip("'")).write_text(json.dumps(gaps))
"""


def bare_step_s(lm: Any, adamw: Any, corpus: Any, steps: int) -> float:
    """Median seconds of forward, selective loss at 0.6, backward, clip, AdamW."""
    from slm.store.windows import Windows

    windows = Windows(corpus)
    optimizer = adamw(lm, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    seconds = []
    for step in range(steps):
        batch = windows.batch(np.arange(step * 32, step * 32 + 32) % len(windows))
        start = time.perf_counter()
        mask = torch.rand(batch["targets"].shape).argsort(0) < 0.6 * 32
        lm(batch, mask).loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[steps // 5 :])


def bench_selection(rows: Rows, folder: Path, small: bool) -> None:
    """Choosing among 16,384 tokens and keeping its books, against a step of the demo's model."""
    import slm.selection as selection
    from slm.selection.books import TokenRecord, source_metrics, step_sums, token_metrics
    from slm.store.shards import Corpus
    from slm.store.windows import IGNORE_INDEX, Windows

    windows = Windows(Corpus.open(make_corpus(folder, TOY_MB if small else 3)))
    size = 16 if small else 128
    batch = windows.batch(np.arange(size)) | {"epoch": torch.zeros(size, dtype=torch.int64)}
    valid = batch["targets"] != IGNORE_INDEX
    losses, reference = (5 * torch.rand(valid.shape) for _ in range(2))
    batch |= {"reference_logprob": -reference, "reference_entropy": reference}
    rules = {
        "excess, batch": selection.Excess(0.6),
        "excess, sequence": selection.Excess(0.6, "sequence"),
        "random, batch": selection.Random(0.6, seed=0),
        "intersection": selection.Intersection(0.7, 0.7),
        "middle": selection.Middle(0.6),
        "softmax": selection.Softmax(1.0),
    }
    mask = rules["excess, batch"].choose(batch, losses, 0).selected
    record = TokenRecord(batch["window"], valid, mask, losses, reference, mask.float())
    lm = small_lm(windows.corpus.vocab_size)

    def books() -> None:
        step_sums(record)
        token_metrics([record])
        source_metrics([record], windows)

    def step() -> None:
        lm(batch, mask).loss.backward()
        lm.zero_grad()

    def step_of(rule: selection.Selection) -> None:
        weight, _ = rule.deferred(batch, 0)
        lm(batch, weight, want_entropy=rule.needs_entropy).loss.backward()
        lm.zero_grad()

    steps = {
        "by_loss": lambda: step_of(selection.Loss(0.6)),
        "by_entropy": lambda: step_of(selection.Entropy(0.6)),
    }
    timed_rules = {
        name: lambda rule=rule: rule.choose(batch, losses, 0) for name, rule in rules.items()
    }
    repeats = 1 if small else 15
    # A few per cent of a step: in CPU time, which other work on the machine changes less.
    cpu = [[timed(one, time.process_time) for one in steps.values()] for _ in range(repeats)]
    seconds = in_turn(repeats, step=step, books=books, **timed_rules)
    for name in rules:
        rows.add("selection", f"{name}, {valid.numel():,} tokens", "s", seconds[name], "<= 0.005")
    share = ratios(seconds["excess, batch"], seconds["step"])
    rows.add("selection", "excess, batch / forward and backward", "1", share, "< 0.02")
    share = ratios(seconds["books"], seconds["step"])
    rows.add("selection", "books of a logged step / the same", "1", share, "< 0.03")
    share = [entropy / loss for loss, entropy in cpu]
    rows.add("selection", "CPU time of a step by entropy / by loss", "1", share, "< 1.03")


def bench_dynamics(rows: Rows, folder: Path, small: bool) -> None:
    """Classes of 320,000 tokens over 1,000 checkpoints; what the callback adds to a run of 192
    steps that evaluates 32,768 targets 33 times, beyond the forward passes."""
    tokens, checkpoints = (2_000, 20) if small else (320_000, 1_000)
    write_columns(folder / "columns", tokens, checkpoints)
    found = [run_json(CLASSIFY, str(folder / "columns")) for _ in range(1 if small else 5)]
    rows.add("dynamics", "classes", "s", [row["seconds"] for row in found], "< 10")
    rows.add("dynamics", "peak memory of it", "MB", [row["peak_mb"] for row in found], "< 1000")
    store_of_lines(folder / "run", *((2_000, 4) if small else (320_000, 64)))
    seconds, sizes = zip(*(page_cost(folder) for _ in range(1 if small else 5)), strict=True)
    rows.add("dynamics", "slm report of 320,000 tokens x 64", "s", list(seconds), "< 30")
    rows.add("dynamics", "its page", "MB", list(sizes), "< 8")
    corpus = make_corpus(folder, TOY_MB if small else 3)
    steps, targets = (3, 500) if small else (192, 32_768)
    added = [
        callback_share(folder / f"run{repeat}", corpus, steps, targets)
        for repeat in range(1 if small else 3)
    ]
    rows.add("dynamics", "share added by the callback", "1", added, "< 0.01")


def store_of_lines(run: Path, tokens: int, checkpoints: int) -> None:
    """A run's folder with the losses of windows of 128, references and a rule."""
    import json

    from slm.dynamics.token_set import TokenSet
    from slm.dynamics.trajectories import TrajectoryStore

    rng = np.random.default_rng(0)
    shape = (tokens // 128, 129)
    ids, live = rng.integers(0, 200, shape).astype(np.uint32), np.ones((shape[0], 128), bool)
    reference = rng.uniform(0, 8, live.sum()).astype(np.float32)
    columns = {"source": np.zeros(live.sum(), np.uint16), "reference_loss": reference}
    pieces = {index: f" word{index}".encode() for index in range(200)}
    drawn = TokenSet(np.arange(shape[0]), ids, live, columns, pieces)
    rule = {"_target_": "slm.selection.Excess", "select_ratio": 0.6, "scope": "batch"}
    plan = {
        "kind": "dynamics", "corpus_fingerprint": "", "windows_sha256": "", "sources": ["text"],
        "run": {"selection": rule, "selection_start": 0, "micro_batch_size": 32, "seed": 0},
    }  # fmt: skip
    run.mkdir()
    (run / "run.json").write_text(json.dumps({}))
    store = TrajectoryStore.create(run / "dynamics" / "tokens", plan, drawn)
    for index in range(checkpoints):
        noise = rng.normal(0, 0.3, live.sum())
        store.append(index, np.abs(reference + rng.normal(0, 1) + noise))


def page_cost(folder: Path) -> tuple[float, float]:
    """(seconds, MB of the page) of a whole `slm report`."""
    words = [f"runs='{folder / 'run'}'", f"out='{folder / 'report'}'"]
    command = [sys.executable, "-m", "slm.report", *words]
    seconds = timed(lambda: subprocess.run(command, check=True, stderr=subprocess.DEVNULL))
    return seconds, (folder / "report" / "report.html").stat().st_size / 1e6


def write_columns(folder: Path, tokens: int, checkpoints: int) -> None:
    """Lines and noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    start, slope = rng.uniform(0, 8, tokens), rng.normal(0, 1, tokens)
    for index in range(checkpoints):
        noise = rng.normal(0, 0.3, tokens)
        column = np.abs(start + slope * index / checkpoints + noise)
        np.save(folder / f"{index:05d}.npy", column.astype(np.float32))


# Classifies the columns of a folder, in a process of its own, since its memory is measured.
CLASSIFY = """
import json, resource, sys, time
from pathlib import Path
from slm.dynamics.classes import classify
from slm.dynamics.trajectories import LossColumns
paths = sorted(Path(sys.argv[1]).iterdir())
columns = LossColumns(paths, paths[0].stat().st_size // 4 - 32)
start = time.perf_counter()
classify(columns)
seconds = time.perf_counter() - start
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak_mb": peak_mb}))
"""


def run_json(script: str, *arguments: str) -> dict[str, float]:
    import json

    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def callback_share(out: Path, corpus: Path, steps: int, targets: int) -> float:
    """Seconds that the callback takes beyond its forward passes, over the training's."""
    words = [f"data.corpus='{corpus}'", f"out='{out}'", f"max_tokens={steps * 4096}",
             "selection=loss", "selection.select_ratio=0.6", "logger=default",
             "callbacks=dynamics", f"callbacks.dynamics.corpus='{corpus}'",
             f"callbacks.dynamics.num_targets={targets}"]  # fmt: skip
    times = run_json(CALLBACK_TIMES, *words)
    return (times["callback"] - times["forward"]) / times["training"]


# Runs `slm train` with clocks around the callback's hooks and around its forward passes.
CALLBACK_TIMES = """
import json, time
from collections import defaultdict
import slm.dynamics.callback, slm.train.__main__
spent = defaultdict(float)
def clocked(name, function):
    def timed(*arguments, **more):
        start = time.perf_counter()
        try:
            return function(*arguments, **more)
        finally:
            spent[name] += time.perf_counter() - start
    return timed
for hook in ("on_train_start", "on_train_batch_end", "on_train_end"):
    whole = clocked("callback", getattr(slm.dynamics.callback.TokenDynamics, hook))
    setattr(slm.dynamics.callback.TokenDynamics, hook, whole)
slm.dynamics.callback.token_losses = clocked("forward", slm.dynamics.callback.token_losses)
from lightning import Trainer
Trainer.fit = clocked("training", Trainer.fit)
slm.train.__main__.main()
print(json.dumps(spent))
"""


def bench_doors(rows: Rows, folder: Path, small: bool) -> None:
    """What other people's trainers pay: the import of the loss, and a step of `Trainer`."""
    command = [sys.executable, "-c", IMPORT]
    run = lambda: float(subprocess.run(command, check=True, capture_output=True).stdout)  # noqa: E731
    run()
    imports = [run() for _ in range(2 if small else 9)]
    rows.add("doors", "import slm_kernels, beyond torch", "s", imports, "< 0.1")
    steps, length = (1, 16) if small else (4, 256)
    ids = torch.randint(16_384, (8 * steps, length), generator=torch.Generator().manual_seed(0))
    scores = torch.full(ids.shape, -5.0).tolist()
    seconds = in_turn(
        1 if small else 7,
        warm=lambda: trainer_run(folder, ids.tolist(), None, 1.0),
        stock=lambda: trainer_run(folder, ids.tolist(), None, 1.0),
        k60=lambda: trainer_run(folder, ids.tolist(), scores, 0.6),
        k30=lambda: trainer_run(folder, ids.tolist(), scores, 0.3),
    )
    for name, ratio in (("k60", 0.6), ("k30", 0.3)):
        relative = ratios(seconds[name], seconds["stock"])
        rows.add("doors", f"SelectiveTrainer at k = {ratio} / Trainer", "1", relative, "")


IMPORT = """
import time, torch
start = time.perf_counter()
import slm_kernels
print(time.perf_counter() - start)
"""


def trainer_run(folder: Path, ids: list[Any], scores: list[Any] | None, ratio: float) -> None:
    """An epoch of steps of eight rows; without `scores` it is transformers' own Trainer."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    from slm.integrations.transformers import SelectiveTrainer

    columns = {"input_ids": ids, "labels": ids}
    fields: dict[str, Any] = {
        "model": small_lm(16_384).model,
        "args": TrainingArguments(
            str(folder), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
            num_train_epochs=1, per_device_train_batch_size=8,
        ),
        "data_collator": default_data_collator,
    }  # fmt: skip
    if scores is None:
        Trainer(train_dataset=Dataset.from_dict(columns), **fields).train()
    else:
        data = Dataset.from_dict(columns | {"reference_logprob": scores})
        SelectiveTrainer(train_dataset=data, select_ratio=ratio, **fields).train()


def bench_help(rows: Rows, folder: Path, small: bool) -> None:
    """Time until a person has read access to help."""
    program = str(Path(sys.executable).parent / "slm")
    for words, target in ((["--help"], "<= 0.3"), (["train", "--help"], "<= 1.5")):
        command = [program, *words]
        run = lambda command=command: subprocess.run(command, check=True, capture_output=True)  # noqa: E731
        if not small:
            run()
        seconds = in_turn(1 if small else 9, run=run)["run"]
        rows.add("help", f"slm {' '.join(words)}", "s", seconds, target)


BENCHMARKS = {
    "help": bench_help,
    "data": bench_data,
    "mixture": bench_mixture,
    "prepare": bench_prepare,
    "import": bench_import,
    "score": bench_score,
    "train": bench_train,
    "selection": bench_selection,
    "dynamics": bench_dynamics,
    "doors": bench_doors,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("which", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    arguments = parser.parse_args()
    rows = Rows()
    for name in arguments.which:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](rows, Path(folder), arguments.small)
        rows.write(arguments.out)


if __name__ == "__main__":
    main()
