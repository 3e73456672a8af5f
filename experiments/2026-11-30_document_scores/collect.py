"""Final losses of the targets -> results.csv, figure.png: `python collect.py RUNS OUT`."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.figure import Axis, Figure, Panel, nth_series
from slm.report.arms import read_runs
from slm.report.paper.plots import draw
from slm.store.files import write_csv

ARMS = {
    "windows": "excess, scores of windows",
    "documents": "excess, scores of documents",
    "other": "excess, another tokenizer",
    "random": "random",
    "all": "all tokens",
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row an arm and ratio: mean over seeds, lowest and highest."""
    found = []
    for arm, title in ARMS.items():
        losses: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in read_runs([str(folder / arm)])[0]:
            ratio = 1.0 if arm == "all" else float(run.select_ratio or 1.0)
            for name, curve in run.curves.items():
                losses[ratio][name].append(float(curve.loss[-1]))
        for ratio, sets in sorted(losses.items()):
            row: dict[str, Any] = {"arm": title, "select_ratio": ratio}
            for name, values in sets.items():
                row |= {name: np.mean(values), f"{name}_low": min(values)}
                row[f"{name}_high"] = max(values)
            row["seeds"] = len(next(iter(sets.values())))
            found.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    return found


def panel(name: str, rows: list[dict[str, Any]]) -> Panel:
    drawn = []
    for index, title in enumerate(ARMS.values()):
        mine = [row for row in rows if row["arm"] == title]
        x, y, low, high = (
            np.array([row[key] for row in mine])
            for key in ("select_ratio", name, f"{name}_low", f"{name}_high")
        )
        drawn.append(nth_series(index, title, x, y)._replace(low=low, high=high))
    x_axis = Axis("select_ratio (k)", "select_ratio", ticks=[0.4, 0.6, 1.0])
    return Panel(name, x_axis, Axis("loss (nats per token)", "loss_nats"), drawn)


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    rows = rows_of(folder)
    write_csv(out / "results.csv", rows)
    sets = [key.removesuffix("_low") for key in rows[0] if key.endswith("_low")]
    note = "points: mean over seeds, bands: lowest to highest"
    panels = [panel(name, rows) for name in sets]
    draw(Figure("", panels, size=(4.4, 4.0), columns=3, legend_title=note), out / "figure.png")


if __name__ == "__main__":
    main()
