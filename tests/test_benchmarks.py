"""The benchmarks run at toy size, so that they cannot rot; their numbers mean nothing here."""

import csv
import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import warm
from common import SKETCHED

BENCHMARKS = Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "count"),
    [([], 7 + 5 + 2), (["--memory"], 3 + 3), (["--trainer"], 2), (["--profile"], 2 * 4 * 2 * 6)],
)
def test_benchmark_of_selected_rows_at_toy_size(tmp_path, monkeypatch, words, count):
    out = tmp_path / "rows.csv"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = [str(BENCHMARKS / "selected.py"), "--small", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*program, *words])
    importlib.import_module("selected").main()
    if "--profile" in words:
        out = tmp_path / "selected_profile.csv"
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    value = "seconds" if "--profile" in words else "median"
    assert len(rows) == count and all(float(row[value]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bind", "quality"])
def test_benchmark_of_two_cases_at_toy_size(tmp_path, monkeypatch, name):
    out = tmp_path / "rows.csv"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small", "--out", str(out)])
    importlib.import_module(name).main()
    found, committed = (
        [row["case"] for row in csv.DictReader(path.read_text().splitlines())]
        for path in (out, BENCHMARKS / "results" / f"{name}.csv")
    )
    assert len(found) == 2 and {*found} <= {*committed}


@pytest.mark.slow
def test_benchmark_of_pivots_at_toy_size(tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = [str(BENCHMARKS / "pivots.py"), "--small", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module("pivots").main()
    found, committed = (
        [row["case"] for row in csv.DictReader(path.read_text().splitlines())]
        for path in (out, BENCHMARKS / "results" / "pivots.csv")
    )
    assert found == committed[-3:]


@pytest.mark.slow
def test_benchmark_of_tasks_at_toy_size(tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = [str(BENCHMARKS / "tasks.py"), "--small", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module("tasks").main()
    rows = [row["case"] for row in csv.DictReader(out.read_text().splitlines())]
    assert len(rows) == 3 and rows[2] == "tokenizers, 1 task / 2 tasks"


@pytest.mark.slow
def test_benchmark_of_shards_at_toy_size(tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "sharded.py"), "--small", "--out", str(out)])
    importlib.import_module("sharded").main()
    found = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["benchmark"] for row in found] == [
        *("memory", *["save"] * 3, "weights", *["heldout"] * 2)
    ]
    assert float(found[0]["median"]) < 0.55


@pytest.mark.slow
def test_benchmark_of_prepare_at_toy_size(tmp_path, monkeypatch):
    def run(line: list[str], place: Path, **more: str) -> None:
        done = warm.run(line, cwd=place, env=os.environ | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    prepare = importlib.import_module("prepare")
    monkeypatch.setattr(prepare, "run", run)
    prepare.compare(tmp_path, None, tmp_path / "rows.csv")
    found = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["unit"] for row in found] == ["s", "s", "1"]
    assert len(list(tmp_path.glob("out1/*.arrow"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["help", "data", "mixture", "prepare", "import", "score", "train", "dynamics", "doors"]
)
def test_benchmark_of_the_pipeline_at_toy_size(tmp_path, monkeypatch, name):
    out = tmp_path / "rows.csv"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pipeline = importlib.import_module("pipeline")
    if name != "help":  # what it times is the start of an interpreter
        forks = {"run": partial(warm.run, after=SKETCHED), "Popen": warm.Popen}
        monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(**vars(subprocess) | forks))
    words = [str(BENCHMARKS / "pipeline.py"), name, "--small", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    pipeline.main()
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(BENCHMARKS / "results" / "pipeline.csv", newline="") as file:
        committed = {row["case"] for row in csv.DictReader(file) if row["benchmark"] == name}
    found = {row["case"] for row in rows}
    assert {case for case in found if "MB of input" not in case} <= committed
    for row in rows:
        assert row["benchmark"] == name and row["machine"] and row["torch"]
        assert float(row["low"]) <= float(row["median"]) <= float(row["high"])
