"""Time and memory of a step of the selective loss against its peers: rows in results/<device>.csv.

    python kernels/benchmarks/bench.py                 the device's shapes at k = 0.3, 0.6 and 1.0
    python kernels/benchmarks/bench.py --small         toy sizes, for the test suite
    python kernels/benchmarks/bench.py --only ours torch

Everything runs in turn within one loop, a matrix product of the same shape among it, so that all
see the same machine. Each row has the median of the repeats with the lowest and the highest, the
peak memory beyond inputs and gradients, and `of_floor`: the time that the arithmetic which cannot
be avoided (1 + 2 k products of hidden and weight) takes at the speed of that product, over the
time.
"""

import argparse
import csv
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from peers import Peer, Problem, available, make_problem  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PRODUCT = "matrix product"
RATIOS = (0.3, 0.6, 1.0)


class Shape(NamedTuple):
    num_tokens: int
    width: int
    vocab_size: int


SHAPES = {
    "cuda": [Shape(8192, 2048, 32000), Shape(16384, 4096, 128256), Shape(16384, 2304, 256000)],
    "cpu": [Shape(4096, 512, 32000), Shape(4096, 512, 8000), Shape(4096, 512, 16000)],
    "small": [Shape(48, 16, 100)],
}
FIELDS: tuple[str, ...] = (
    "peer", "num_tokens", "width", "vocab_size", "select_ratio", "dtype", "median_ms", "low_ms",
    "high_ms", "repeats", "peak_extra_mb", "of_floor", "device", "cores", "torch", "triton",
    "liger_kernel", "cut_cross_entropy", "quack_kernels", "date",
)  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    found = {name.replace("-", "_"): installed(name) for name in packages}
    return {
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(),
    } | found


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def timed(device: str, function: Callable[[], Any]) -> float:
    """Milliseconds, from an idle device to an idle device."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1000
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def clear(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def times_in_turn(
    peers: dict[str, Peer], problem: Problem, ratio: float, repeats: int, device: str
) -> dict[str, list[float]]:
    buffer = problem.hidden.new_empty(len(problem.hidden), len(problem.weight))
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    functions: dict[str, Callable[[], Any]] = {
        name: lambda peer=peer: peer(problem, ratio) for name, peer in peers.items()
    }
    functions[PRODUCT] = lambda: torch.mm(hidden, weight.T, out=buffer)
    for function in functions.values():  # compiles and allocates
        function()
        clear(problem)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(device, function))
            clear(problem)
    return times


def gradient_bytes(problem: Problem) -> int:
    return problem.hidden.nbytes + problem.weight.nbytes


def peak_extra_mb(name: str, shape: Shape, ratio: float, dtype: str, device: str) -> float:
    """Beyond inputs and gradients, during one step."""
    if device == "cpu":  # a process of its own, since a resident set never shrinks
        words = ["--peak-of", name, "--ratio", str(ratio), "--dtype", dtype]
        words += ["--shape", *(str(size) for size in shape)]
        command = [sys.executable, __file__, *words]
        return float(subprocess.run(command, check=True, capture_output=True).stdout.split()[-1])
    peer = available(device)[0][name]
    problem = make_problem(*shape, getattr(torch, dtype), device)
    peer(problem, ratio)
    clear(problem)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peer(problem, ratio)
    return (torch.cuda.max_memory_allocated() - before - gradient_bytes(problem)) / 2**20


def print_cpu_peak(name: str, shape: Shape, ratio: float, dtype: str) -> None:
    peer = available("cpu")[0][name]
    peer(make_problem(256, 64, 512, getattr(torch, dtype), "cpu"), ratio)  # loads the libraries
    problem = make_problem(*shape, getattr(torch, dtype), "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = status_kb("VmRSS")
    peer(problem, ratio)
    print((status_kb("VmHWM") - before) / 2**10 - gradient_bytes(problem) / 2**20)


def status_kb(field: str) -> int:
    """Of this process alone: getrusage's peak is inherited from the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def run_shape(
    shape: Shape, ratio: float, dtype: str, repeats: int, device: str, only: list[str]
) -> list[dict[str, Any]]:
    peers, missing = available(device)
    peers = {name: p for name, p in peers.items() if not only or any(o in name for o in only)}
    problem = make_problem(*shape, getattr(torch, dtype), device)
    broken = {}
    for name in list(peers):
        try:
            peers[name](problem, ratio)
        except (RuntimeError, ValueError, TypeError) as error:
            broken[name] = str(error).splitlines()[0]
            del peers[name]
        clear(problem)
    for name, reason in (missing | broken).items():
        print(f"absent: {name}: {reason}")
    times = times_in_turn(peers, problem, ratio, repeats, device)
    floor = (1 + 2 * ratio) * statistics.median(times[PRODUCT])
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        peak = "" if name == PRODUCT else peak_extra_mb(name, shape, ratio, dtype, device)
        row = dict(shape._asdict(), peer=name, select_ratio=ratio, dtype=dtype, median_ms=median)
        row |= {"low_ms": min(values), "high_ms": max(values), "repeats": len(values)}
        of_floor = "" if name == PRODUCT else floor / median
        row |= {"peak_extra_mb": peak, "of_floor": of_floor} | machine(device)
        rows.append(row)
        shown = "" if name == PRODUCT else f"{of_floor:6.2f} of floor {peak:9.1f} MB"
        print(f"  {name:40} {median:9.2f} ms  ({min(values):.2f} to {max(values):.2f})  {shown}")
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def result_file(device: str) -> Path:
    name = device_name(device).lower() if device == "cuda" else "cpu"
    return RESULTS / f"{name.replace(' ', '-')}.csv"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--only", nargs="+", default=[], help="peers whose name contains one")
    parser.add_argument("--repeats", type=int, help="default: 10 on a GPU, 5 on a CPU")
    parser.add_argument("--out", type=Path, help="CSV that the rows are added to")
    parser.add_argument("--shape", nargs=3, type=int, help="N D V, instead of the device's own")
    parser.add_argument("--ratio", type=float, help="one select_ratio, instead of 0.3, 0.6, 1.0")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    if given.peak_of:
        return print_cpu_peak(given.peak_of, Shape(*given.shape), given.ratio, dtype)
    shapes = SHAPES["small" if given.small else given.device]
    repeats = given.repeats or (2 if given.small else 10 if given.device == "cuda" else 5)
    for shape in [Shape(*given.shape)] if given.shape else shapes:
        for ratio in [given.ratio] if given.ratio else RATIOS:
            print(f"{shape}, k = {ratio}, {dtype}, {device_name(given.device)}", flush=True)
            rows = run_shape(shape, ratio, dtype, repeats, given.device, given.only)
            write(rows, given.out or result_file(given.device))


if __name__ == "__main__":
    main()
