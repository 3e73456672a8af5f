"""The whole pipeline on text that every machine has: the installed Python standard library.

    slm demo                (or `make demo`: minutes on two cores, nothing is downloaded)

Curated text: docstrings and the language reference. Raw text: the source files, tables and all.
Modules are split, so that neither the docstrings nor the source of a held-out module is trained on:
nearly every docstring stands verbatim in its source. As in the paper, one base model is shared: the
reference is the base tuned on the curated text, the targets continue the base on the raw corpus
with all, random and excess selection. Two baselines stand beside them: the reference model itself,
and all tokens of a corpus with the curated text mixed in, at the same number of tokens. While the
targets train, the loss of every token of some held-out source is kept: see dynamics/.

Every stage is a command, printed before it runs; a demo that was stopped goes on where it was.
"""

import ast
import csv
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from slm.checks import check
from slm.cli import command
from slm.command_keys import DEMO
from slm.errors import UserError
from slm.store.files import atomic_file

log = logging.getLogger("slm.demo")
HELDOUT_SHARE = 0.12
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
SKIPPED |= {"idlelib", "tkinter", "turtledemo", "distutils", "lib2to3"}  # for time, or gone since
BLOCKS = {"body", "handlers", "orelse", "finalbody", "cases"}
RULES = ("all", "random", "excess")
HELDOUT_RAW_SIZE = 200_000  # characters
WINDOWS = 128  # of it, during training
HELDOUT = "docstrings of held-out modules"


# ---- text -------------------------------------------------------------------------------------


def source_files() -> list[tuple[str, Path]]:
    """(path within the library, file) of every module of the standard library, tests left out."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - SKIPPED  # before it looks into them: site-packages can be large
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return [(path.relative_to(root).as_posix(), path) for path in sorted(found)]


def is_heldout(name: str) -> bool:
    """Split by top-level module, by a hash, so that the split never changes."""
    top = name.split("/")[0].removesuffix(".py")
    number = int.from_bytes(hashlib.sha256(top.encode()).digest()[:8], "big")
    return number / 2**64 < HELDOUT_SHARE


def docstrings(name: str, source: str) -> Iterator[str]:
    """'module.name\\n\\ndocstring' of everything documented; the language reference by topic."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    if name == "pydoc_data/topics.py":
        yield from (node.value for node in ast.walk(tree) if is_topic(node))  # type: ignore[attr-defined]
        return
    module = name.removesuffix(".py").replace("/", ".")
    for node in statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                label = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                yield f"{label}\n\n{text}"


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As ast.walk, in its order, but not into expressions, which are nine nodes in ten."""
    level: list[ast.AST] = [tree]
    for node in level:
        yield node
        blocks = [getattr(node, field) for field in node._fields if field in BLOCKS]
        level += [child for block in blocks for child in block]


def is_topic(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200


def write_texts(folder: str | Path) -> None:
    """raw, curated, heldout_raw (some source of held-out modules) and heldout, as .jsonl files
    with `name` and `text`."""
    folder, kinds = Path(folder), ("raw", "curated", "heldout_raw", "heldout")
    rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in kinds}
    for name, path in source_files():
        source = path.read_text(encoding="utf-8", errors="replace").replace("\0", " ")
        kind = "heldout" if is_heldout(name) else "curated"
        rows[kind] += [{"name": name, "text": text} for text in docstrings(name, source)]
        if name != "pydoc_data/topics.py" and source.strip():
            side = "raw" if kind == "curated" else "heldout_raw"
            rows[side].append({"name": name, "text": source})
    rows["heldout_raw"] = some_of(rows["heldout_raw"], HELDOUT_RAW_SIZE)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, records in rows.items():
        if not records:
            raise UserError(
                f"the standard library at {sysconfig.get_paths()['stdlib']} has no {kind} text"
            )
        with atomic_file(folder / f"{kind}.jsonl") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        size = sum(len(record["text"]) for record in records) / 1e6
        log.info("%s: %d documents, %.1f MB", kind, len(records), size)


def some_of(records: list[dict[str, str]], size: int) -> list[dict[str, str]]:
    """As many as have so many characters, in an order that has nothing to do with their names."""
    mixed = sorted(records, key=lambda record: hashlib.sha256(record["name"].encode()).digest())
    sizes = np.cumsum([len(record["text"]) for record in mixed])
    return mixed[: int(np.searchsorted(sizes, size)) + 1]


# ---- stages -----------------------------------------------------------------------------------


def run(*words: str) -> None:
    """Print a command and run it; its output is the user's to see."""
    print(f"\n$ slm {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", f"slm.{words[0]}", *words[1:]]).returncode
    if code != 0:
        raise UserError(f"`slm {words[0]}` ended with exit code {code}")


def quoted(path: Path | str) -> str:
    """A value that Hydra takes literally, whatever characters the path has."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def prepare(out: Path, config: Any) -> None:
    """Three corpora with one tokenizer (raw, curated, both mixed) and two held-out sets."""
    text, corpora = out / "text", out / "corpora"

    def make(name: str, files: list[str], *more: str) -> None:
        sources = ", ".join(quoted(text / f"{file}.jsonl") for file in files)
        run("prepare", f"sources=[{sources}]", f"out={quoted(corpora / name)}",
            f"seq_len={config.seq_len}", *more)  # fmt: skip

    first = f"tokenizer.vocab_size={config.vocab_size}"
    same = f"tokenizer.path={quoted(corpora / 'raw' / 'train' / 'tokenizer')}"
    make("raw", ["raw"], first, "heldout_ratio=0")
    make("curated", ["curated"], same, "heldout_ratio=0")
    make("mixed", ["raw", "curated"], same, "heldout_ratio=0")
    make("docs", ["heldout"], same, "heldout_ratio=1")
    make("code", ["heldout_raw"], same, "heldout_ratio=1")


def train(out: Path, name: str, corpus: str, tokens: int, config: Any, *more: str) -> None:
    """One `slm train`; a sweep where `more` ends in -m."""
    heldout = quoted(out / "corpora" / "docs" / "heldout")
    run(
        "train",
        f"out={quoted(out / 'runs' / name)}",
        f"data.corpus={quoted(out / 'corpora' / corpus / 'train')}",
        f"data.heldout={{docs: {heldout}}}",
        f"data.heldout_windows={WINDOWS}",
        f"max_tokens={tokens}",
        f"callbacks.heldout.every_tokens={tokens // 8}",
        *config.train,
        *more,
    )


def stages(out: Path, config: Any) -> None:
    base = f"model.init_from={quoted(out / 'runs' / 'base' / 'model')}"
    seeds = f"seed={','.join(str(seed) for seed in range(config.seeds))}"
    references = out / "references"
    rate, ratio = f"optimizer.adamw.lr={config.continue_lr}", config.select_ratio
    tokens = config.target_tokens
    train(out, "base", "raw", config.base_tokens, config, "selection=all",
          f"optimizer.adamw.lr={config.base_lr}")  # fmt: skip
    train(out, "reference", "curated", tokens, config, "selection=all", base, rate)
    model = f"reference_model={quoted(out / 'runs' / 'reference' / 'model')}"
    for name, side in (("raw", "train"), ("code", "heldout")):
        corpus = quoted(out / "corpora" / name / side)
        run("score", f"corpus={corpus}", model, f"out={quoted(references / name)}")
    for rule in RULES:
        extra = () if rule == "all" else (f"selection.select_ratio={ratio}",)
        train(out, rule, "raw", tokens, config, f"selection={rule}", seeds, base, rate,
              f"data.references={quoted(references / 'raw')}", *dynamics(out, config), *extra,
              "-m")  # fmt: skip
    train(out, "mixed", "mixed", tokens, config, "selection=all", seeds, base, rate, "-m")


def dynamics(out: Path, config: Any) -> list[str]:
    """The loss of every token of some source of held-out modules, 16 times in a run."""
    words = {
        "corpus": quoted(out / "corpora" / "code" / "heldout"),
        "references": quoted(out / "references" / "code"),
        "num_targets": config.dynamics_targets,
        "every_tokens": config.target_tokens // 16,
    }
    named = [f"callbacks.dynamics.{name}={value}" for name, value in words.items()]
    return ["callbacks=dynamics", *named]


def run_folders(out: Path) -> dict[str, list[Path]]:
    """Label -> the runs with it, one a seed."""
    found = {"base": [out / "runs" / "base"], "reference": [out / "runs" / "reference"]}
    for name in (*RULES, "mixed"):
        found[name] = sorted(path.parent for path in (out / "runs" / name).rglob("run.json"))
    return found


# ---- results ----------------------------------------------------------------------------------


def results(out: Path, config: Any) -> None:
    models = {
        f"{label}/{index}": folder / "model"
        for label, folders in run_folders(out).items()
        for index, folder in enumerate(folders)
    }
    listed = ", ".join(f"{name}: {quoted(folder)}" for name, folder in models.items())
    run("evaluate", f"models={{{listed}}}", f"out={quoted(out / 'evaluation.csv')}",
        f"sets={{docs: {quoted(out / 'corpora' / 'docs' / 'heldout')}}}")  # fmt: skip
    print_table(out, config)
    figure(out)
    report(out)


def labels(ratio: float) -> dict[str, str]:
    return {
        "base": "base, before",
        "reference": "reference model itself",
        "all": "all tokens",
        "random": f"random {ratio}",
        "excess": f"excess {ratio}",
        "mixed": "all tokens, curated text mixed in",
    }


def print_table(out: Path, config: Any) -> None:
    """Held-out loss of every model, mean over seeds; written to results.csv as well."""
    losses: dict[str, list[dict[str, float]]] = defaultdict(list)
    with open(out / "evaluation.csv", newline="") as file:
        for row in csv.DictReader(file):
            values = {key: float(row[key]) for key in ("loss", "bits_per_byte")}
            losses[row["model"].split("/")[0]].append(values)
    table = Table(
        "run", "loss (nats)", "over seeds", "bits per byte", title=f"Loss on all of {HELDOUT}"
    )
    lines = ["run,loss_mean,loss_min,loss_max,bits_per_byte_mean,num_seeds"]
    for name, label in labels(config.select_ratio).items():
        loss = np.array([value["loss"] for value in losses[name]])
        bits = np.mean([value["bits_per_byte"] for value in losses[name]])
        spread = f"{loss.min():.4f} to {loss.max():.4f}" if len(loss) > 1 else ""
        table.add_row(label, f"{loss.mean():.4f}", spread, f"{bits:.4f}")
        lines.append(f'"{label}",{loss.mean()},{loss.min()},{loss.max()},{bits},{len(loss)}')
    with atomic_file(out / "results.csv") as file:
        file.write(("\n".join(lines) + "\n").encode())
    Console().print(table)


def figure(out: Path) -> None:
    from slm.report.paper.plots import draw
    from slm.report.sweep_figures import loss_curves
    from slm.train.curves import read_curve

    folders = run_folders(out)
    names = {
        "all": "all tokens",
        "random": "random",
        "excess": "excess",
        "mixed": "all, curated mixed in",
    }
    curves = [
        read_curve(folder, label, "docs")
        for name, label in names.items()
        for folder in folders[name]
    ]
    reference = read_curve(folders["reference"][0], "reference", "docs").loss[-1]
    lines = {"reference model": float(reference)}
    draw(loss_curves(curves, lines, f"Loss on {WINDOWS} windows of {HELDOUT}"), out / "figure.png")


def report(out: Path) -> None:
    """All of it on one page, with real text and every token's class in it."""
    runs = out / "runs"
    lines = {"base before": "base", "reference model": "reference", "curated mixed in": "mixed"}
    named = ", ".join(f"{label}: {quoted(runs / name)}" for label, name in lines.items())
    run("report", f"runs=[{', '.join(quoted(runs / name) for name in RULES)}]",
        f"baselines={{{named}}}", f"out={quoted(out / 'report')}")  # fmt: skip


@command("demo")
def main(**settings: Any) -> None:
    check(settings, DEMO)
    config = SimpleNamespace(**settings)
    start, out = time.perf_counter(), Path(config.out)
    if not (out / "text" / "heldout.jsonl").exists():  # written last
        write_texts(out / "text")
    prepare(out, config)
    stages(out, config)
    results(out, config)
    minutes = (time.perf_counter() - start) / 60
    print(f"\nDone in {minutes:.1f} minutes. Look at {out}/report/report.html.")


if __name__ == "__main__":
    main()
