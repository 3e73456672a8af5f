"""Selected minus exact at equal tokens, seconds and FLOPs -> differences.csv, cost.png.

python results.py COSTS RUNS OUT      RUNS: the folder of run.sh's trainings

Runs of equal tokens and of equal FLOPs were trained. What as many seconds buy lies on the line
through the two, by tokens. Differences are of runs of one seed, which read the same windows.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.figure import Axis, Figure, Panel, nth_series
from slm.report.arms import Run, read_runs
from slm.report.paper.plots import draw
from slm.store.files import write_csv

Runs = dict[int, Run]  # by seed
SMOLLM2, HERE = "equal seconds at SmolLM2-135M's shape", "equal seconds at this shape"


def by_seed(folder: Path, ratio: float, backward: str) -> Runs:
    runs, _ = read_runs([str(folder)])
    return {
        run.lineage["seed"]: run
        for run in runs
        if (run.select_ratio, run.identity["model.backward"]) == (ratio, backward)
    }


def loss_at(tokens: float, short: Run, longer: Run, name: str) -> float:
    (x, y), (loss, later) = (
        (run.lineage["tokens_seen"] for run in (short, longer)),
        (float(run.curves[name].loss[-1]) for run in (short, longer)),
    )
    return loss + (later - loss) * (tokens - x) / (y - x)


def rows_of(cost: dict[str, float], runs: Path) -> list[dict[str, Any]]:
    """Of one ratio: a row a held-out set and budget."""
    ratio = cost["select_ratio"]
    exact, short = (by_seed(runs / "excess", ratio, kind) for kind in ("exact", "selected"))
    longer = by_seed(runs / f"flops_{ratio:g}", ratio, "selected")
    seeds = sorted(exact.keys() & short.keys() & longer.keys())
    tokens = exact[seeds[0]].lineage["tokens_seen"]
    budgets = {
        "equal tokens": tokens,
        HERE: tokens / cost["selected_over_exact_seconds"],
        SMOLLM2: tokens / cost["selected_over_exact_smollm2_seconds"],
        "equal FLOPs": longer[seeds[0]].lineage["tokens_seen"],
    }
    rows = []
    for name in exact[seeds[0]].curves:
        before = np.array([exact[seed].curves[name].loss[-1] for seed in seeds])
        for at, budget in budgets.items():
            after = np.array([loss_at(budget, short[seed], longer[seed], name) for seed in seeds])
            rows.append(
                {"select_ratio": ratio, "set": name, "at": at, "tokens": round(budget)}
                | {"exact": before.mean(), "selected": after.mean()}
                | {"difference": (after - before).mean()}
                | {"low": (after - before).min(), "high": (after - before).max()}
                | {"seeds": len(seeds)}
            )
    return [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def panel(name: str, rows: list[dict[str, Any]]) -> Panel:
    drawn = []
    for index, at in enumerate(dict.fromkeys(row["at"] for row in rows)):
        mine = sorted((row for row in rows if row["at"] == at), key=lambda row: row["select_ratio"])
        x, y, low, high = (
            np.array([row[key] for row in mine])
            for key in ("select_ratio", "difference", "low", "high")
        )
        drawn.append(nth_series(index, at, x, y)._replace(low=low, high=high))
    x_axis = Axis("select_ratio (k)", "select_ratio", ticks=list(drawn[0].x))
    y_axis = Axis("selected minus exact (nats per token)", "difference_nats", from_zero=True)
    return Panel(name, x_axis, y_axis, drawn)


def main() -> None:
    costs, runs, out = sys.argv[1:]
    with open(costs, newline="") as file:
        lines = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    rows = [row for cost in lines for row in rows_of(cost, Path(runs))]
    Path(out).mkdir(exist_ok=True)
    write_csv(Path(out) / "differences.csv", rows)
    sets = dict.fromkeys(row["set"] for row in rows)
    panels = [panel(name, [row for row in rows if row["set"] == name]) for name in sets]
    note = "points: mean over seeds, bands: lowest to highest"
    figure = Figure("", panels, size=(4.4, 4.0), columns=3, legend_title=note)
    draw(figure, Path(out) / "cost.png")


if __name__ == "__main__":
    main()
