"""Runs -> results.csv (against all tokens of the same seed), again.csv, figure.png.

python results.py RUNS OUT

Nats per token on the held-out sets; a difference is of runs of one seed, which read the same
windows in the same order.
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
from slm.train.curves import Curve

FORGOTTEN = "gsm8k_test"
KEPT = {"math_500": "MATH-500 (near)", "wikitext": "WikiText (general)"}
UNITS = {
    "mask": "tokens, no targets",
    "replace": "tokens, no inputs either",
    "documents": "whole documents",
    "random": "random tokens",
}
Runs = dict[int, Run]  # by seed


def by_seed(folder: Path) -> Runs:
    runs, left_out = read_runs([str(folder)])
    assert not left_out, left_out
    return {run.lineage["seed"]: run for run in runs}


def final(runs: Runs, name: str) -> np.ndarray:  # (seeds,)
    return np.array([runs[seed].curves[name].loss[-1] for seed in sorted(runs)])


def rows_of(unit: str, share: int, runs: Runs, every: Runs) -> list[dict[str, Any]]:
    rows = []
    for name in (FORGOTTEN, *KEPT):
        loss = final(runs, name)
        apart = loss - final(every, name)
        rows.append(
            {"unit": unit, "share": share, "set": name, "loss": loss.mean()}
            | {"minus_all_tokens": apart.mean(), "low": apart.min(), "high": apart.max()}
            | {"seeds": len(loss)}
        )
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def tokens_to(curve: Curve, loss: float) -> float:
    """Until the curve first reaches `loss`, interpolated; infinite if it never does."""
    below = np.flatnonzero(curve.loss <= loss)
    if not len(below) or below[0] == 0:
        return 0.0 if len(below) else np.inf
    pair = slice(below[0] - 1, below[0] + 1)
    return float(np.interp(-loss, -curve.loss[pair], curve.tokens_seen[pair]))


def curve_of(run: Path) -> Curve:
    (found,), _ = read_runs([str(run)])
    return found.curves[FORGOTTEN]


def again_rows(folder: Path) -> list[dict[str, Any]]:
    """How many tokens of the domain bring each arm where all tokens of its seed had ended."""
    rows = []
    for arm in sorted(folder.iterdir()):
        for run in sorted(arm.iterdir()):
            curve, target = curve_of(run), float(curve_of(folder / "all" / run.name).loss[0])
            rows.append(
                {
                    "arm": arm.name,
                    "seed": run.name.removeprefix("seed_"),
                    "before": round(float(curve.loss[0]), 4),
                }
                | {"all_tokens": round(target, 4), "tokens": round(tokens_to(curve, target), 0)}
                | {"after": round(float(curve.loss[-1]), 4), "of": int(curve.tokens_seen[-1])}
            )
    return rows


def panel(kept: str, rows: list[dict[str, Any]]) -> Panel:
    drawn = []
    for index, unit in enumerate(UNITS):
        mine = [row for row in rows if row["unit"] == unit]
        x, y = (
            np.array([row["minus_all_tokens"] for row in mine if row["set"] == name])
            for name in (kept, FORGOTTEN)
        )
        drawn.append(nth_series(index, UNITS[unit], x, y))
    axes = (
        Axis("loss minus that of all tokens, nats: lost elsewhere", "kept_nats"),
        Axis("GSM8K test, the same: forgotten", "gone_nats"),
    )
    return Panel(KEPT[kept], *axes, drawn)


def main() -> None:
    runs, out = map(Path, sys.argv[1:])
    every = by_seed(runs / "all")
    arms = sorted(
        (list(UNITS).index(unit), int(share), unit)
        for unit, share in (path.name.split("_") for path in runs.glob("*_[0-9]*"))
    )
    rows = rows_of("all", 0, every, every)
    for _, share, unit in arms:
        rows += rows_of(unit, share, by_seed(runs / f"{unit}_{share}"), every)
    write_csv(out / "results.csv", rows)
    again = again_rows(runs / "again")
    write_csv(out / "again.csv", again)
    panels = [panel(kept, rows) for kept in KEPT]
    note = "from below: 3, 10, 25 and 50% of the tokens kept out; means of three seeds"
    draw(Figure("", panels, size=(4.8, 4.0), columns=2, legend_title=note), out / "figure.png")
    for row in csv.reader((out / "results.csv").read_text().splitlines()):
        print(*(f"{cell:>12}" for cell in row))
    for row in again:
        print(*row.values())


if __name__ == "__main__":
    main()
