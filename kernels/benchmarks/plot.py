"""Time and memory against select_ratio and vocabulary, from the rows of a result file.

python kernels/benchmarks/plot.py kernels/benchmarks/results/cpu.csv     writes cpu.png there
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ["#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]
PRODUCT = "matrix product"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of peers; of rows with the same case, the last."""
    numbers = ("num_tokens", "width", "vocab_size", "select_ratio", "median_ms", "peak_extra_mb")
    latest = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["peer"] != PRODUCT:
                values = {name: float(row[name]) for name in numbers}
                key = tuple(values[name] for name in numbers[:4]) + (row["peer"],)
                latest[key] = row | values
    return list(latest.values())


def panel(axes: Any, rows: list[dict[str, Any]], x: str, y: str) -> None:
    peers = sorted({row["peer"] for row in rows}, key=lambda name: ("ours" not in name, name))
    for peer, colour in zip(peers, COLOURS * 2, strict=False):
        points = sorted((row[x], row[y]) for row in rows if row["peer"] == peer)
        style = {"linewidth": 2.5} if peer.startswith("ours") else {"linewidth": 1.2, "ls": "--"}
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=peer, **style)
    axes.set(xlabel={"select_ratio": "select_ratio", "vocab_size": "vocabulary"}[x])
    axes.set(ylabel={"median_ms": "forward + backward (ms)", "peak_extra_mb": "extra MB"}[y])
    if y == "median_ms":
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path)
    given = parser.parse_args()
    rows = read(given.results)
    first = rows[0]
    against_k = [row for row in rows if row["vocab_size"] == first["vocab_size"]]
    ratio = sorted({row["select_ratio"] for row in rows})[
        len({r["select_ratio"] for r in rows}) // 2
    ]
    against_v = [row for row in rows if row["select_ratio"] == ratio]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for line, y in zip(axes, ("median_ms", "peak_extra_mb"), strict=True):
        panel(line[0], against_k, "select_ratio", y)
        panel(line[1], against_v, "vocab_size", y)
    axes[0, 0].set_title(f"N = {first['num_tokens']:.0f}, D = {first['width']:.0f}, "
                         f"V = {first['vocab_size']:.0f}, {first['dtype']}")  # fmt: skip
    axes[0, 1].set_title(f"select_ratio = {ratio}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(first["device"])
    figure.savefig(given.results.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
