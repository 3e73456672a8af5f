"""The kernels' benchmark runs at toy size, and what the kernels compile to passes the gate."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import warm

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    script.main()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_benchmark_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench, plot = importlib.import_module("bench"), importlib.import_module("plot")
    monkeypatch.setattr(bench.subprocess, "run", warm.run)
    out = tmp_path / "rows.csv"
    words = ("--small", "--device", "cpu", "--ratio", "0.6", "--only", "ours", "plain torch")
    run(bench, monkeypatch, *words, "--out", str(out))
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    peers = {row["peer"] for row in rows}
    assert {"ours", "ours, full cache", "plain torch, masked", "matrix product"} <= peers
    assert {float(row["select_ratio"]) for row in rows} == {0.6}
    for row in rows:
        assert float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert row["torch"] and row["device"]
    run(plot, monkeypatch, str(out))
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_kernels_compile_without_spills_and_with_tensor_cores():
    # With the interpreter there would be nothing to compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # the same code, sooner
    command = [sys.executable, str(BENCHMARKS / "compiled.py"), "--dtype", "bf16"]
    command += ["--options", "everything", "divisible"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # all dtypes and options: `make compile-gate`; a kernel that may spill or store narrowly is here
    kernels = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert len(kernels) == 16 and set(kernels) == {"stats", "score", "gradient", "cached"}


def test_the_gate_sees_spills_narrow_stores_and_missing_tensor_cores(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compiled

    tile = compiled.TILES["hopper", True]
    case = compiled.Case("stats", None, "hopper", "bf16", tile, {}, {"BLOCK_D": 64}, "plain")
    assert compiled.Row(case, 255, 0, 0, 144.0, 4, 64).faults() == []
    assert len(compiled.Row(case, 255, 8, 2, 144.0, 4, 0).faults()) == 1
    assert len(compiled.Row(case, 255, 8, 2, 230.0, 0, 0).faults()) == 3
    case = case._replace(label="divisible")
    assert compiled.Row(case, 255, 0, 0, 144.0, 4, 64).faults() == ["64 stores of two bytes"]
