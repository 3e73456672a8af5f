"""`results.py folder out`: results.csv and figure.png, means over seeds."""

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from slm.store.files import write_csv

ARMS = {
    "base": "before, base 10,000",
    "base_rope": "before, base 50,000",
    "short": "128 further",
    "natural": "512, natural",
    "natural_rope": "512, natural, base 50,000",
    "pieces": "512, pieces",
    "pieces_rope": "512, pieces, base 50,000",
    "gain_rope": "long_gain 0.6, base 50,000",
    "random_rope": "random 0.6, base 50,000",
}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def by_arm(rows: list[dict[str, str]], place: Any, key: str) -> dict[tuple[str, Any], list[float]]:
    """Values of the seeds, by arm and place."""
    found = defaultdict(list)
    for row in rows:
        found[re.sub(r"_\d+$", "", row["model"]), place(row)].append(float(row[key]))
    return found


def main(folder: str, out: str) -> None:
    rows = read(Path(folder) / "positions.csv") + read(Path(folder) / "positions_rope.csv")
    losses = by_arm(rows, lambda row: (int(row["from_position"]), int(row["to_position"])), "loss")
    spans = sorted({place for _, place in losses})
    needles = read(Path(folder) / "needle.csv")
    found = by_arm(needles, lambda row: int(row["length"]), "accuracy")
    lengths = sorted({length for _, length in found})
    table = []
    for arm in ARMS:
        row: dict[str, Any] = {"arm": arm}
        for begin, end in spans:
            values = losses[arm, (begin, end)]
            row |= {f"loss_{begin}_{end}": round(fmean(values), 4)}
            row |= {f"seeds_{begin}_{end}": " ".join(f"{value:.4f}" for value in values)}
        for length in lengths:
            values = found[arm, length]
            row[f"needle_{length}"] = round(fmean(values), 3) if values else ""
        table.append(row)
    write_csv(Path(out) / "results.csv", table)
    draw(losses, [span for span in spans if span != (0, spans[-1][1])], Path(out) / "figure.png")


def draw(losses: dict[tuple[str, Any], list[float]], spans: list[Any], path: Path) -> None:
    """Against the model before, since each range has a text of its own."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes, ends = figure.subplots(), [spans[0][0], *(end for _, end in spans)]
    for number, arm in enumerate([arm for arm in ARMS if arm != "base"]):
        values = [fmean(losses[arm, span]) - fmean(losses["base", span]) for span in spans]
        axes.stairs(values, ends, baseline=None, label=ARMS[arm], color=f"C{number}")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(128, color="grey", linewidth=0.5)
    axes.set(xlabel="position in the window (tokens)", xticks=[0, 128, 256, 384, 512])
    axes.set_ylabel("held-out loss - that of the model before (nats)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
