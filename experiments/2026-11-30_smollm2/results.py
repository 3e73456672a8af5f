"""What run.sh's models lose in windows of held-out text, and what lm_eval says of them.

python results.py OUT FOLDER     FOLDER/losses.csv (every window), results.csv, differences.csv,
                                 tasks.csv, figure.png
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm.dynamics.colours import PALETTE
from slm.dynamics.figure import Axis, Figure, Panel, Series
from slm.report.differences import student
from slm.report.paper.plots import draw
from slm.store.files import write_csv
from slm.train.curves import read_window_losses

ARMS = {
    "base": "SmolLM2-135M-Instruct (4 bits), before",
    "reference": "the reference model itself",
    "all": "all tokens",
    "random_0.4": "random 0.4",
    "random_0.4_selected": "random 0.4, backward=selected",
    "excess_0.4": "excess 0.4",
    "excess_0.4_selected": "excess 0.4, backward=selected",
    "excess_0.6_selected": "excess 0.6, backward=selected",
    "mixed": "all tokens, curated text mixed in",
}
# What is subtracted from what, on the same windows.
PAIRS = (
    ("random_0.4", "all"),
    ("random_0.4_selected", "all"),
    ("excess_0.4", "all"),
    ("excess_0.4_selected", "all"),
    ("excess_0.6_selected", "all"),
    ("mixed", "all"),
    ("reference", "all"),
    ("excess_0.4", "random_0.4"),
    ("excess_0.4_selected", "random_0.4_selected"),
    ("excess_0.4_selected", "excess_0.4"),
    ("excess_0.4", "mixed"),
    ("excess_0.4_selected", "mixed"),
)
OTHER = ("code", "noisy", "wikitext")  # held-out sets that are not of the curated text's domain
Losses = dict[str, dict[str, dict[str, np.ndarray]]]  # arm, set, seed -> nats a target, by window


def read(out: Path) -> list[dict[str, str]]:
    """Of every window at the end of a run; the base's are a run's before its first step."""
    rows = []
    for path in sorted(out.glob("runs/**/heldout_windows.csv")):
        if not (path.parent / "model").exists():
            continue  # it runs
        arm, _, seed = str(path.parent.relative_to(out / "runs")).partition("/seed=")
        found = read_window_losses(path.parent)
        last = max(seen for _, seen in found)
        wanted = {arm: last} | ({"base": 0} if arm == "reference" else {})
        for (name, seen), losses in found.items():
            for label in (label for label, at in wanted.items() if at == seen):
                columns = zip(losses.window, losses.nats, losses.targets, strict=True)
                for window, nats, targets in columns:
                    row = {"arm": label, "seed": seed, "set": name, "window": str(int(window))}
                    rows.append(row | {"nats": f"{nats:.4f}", "targets": str(int(targets))})
    return rows


def sets_of(rows: list[dict[str, str]]) -> list[str]:
    """Those of the domain first."""
    names = {row["set"] for row in rows}
    return sorted(names, key=lambda name: (name in OTHER, name))


def losses_of(rows: list[dict[str, str]], sets: list[str]) -> Losses:
    found: Losses = {arm: {name: {} for name in sets} for arm in ARMS}
    lists: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        key = row["arm"], row["set"], row["seed"]
        lists.setdefault(key, []).append(float(row["nats"]) / int(row["targets"]))
    for (arm, name, seed), values in lists.items():
        found[arm][name][seed] = np.array(values)
    return {arm: of for arm, of in found.items() if any(of.values())}


def results(losses: Losses) -> Iterator[dict[str, str]]:
    for arm, by_set in losses.items():
        for name, by_seed in by_set.items():
            means = [values.mean() for values in by_seed.values()]
            numbers = {"mean": np.mean(means), "low": min(means), "high": max(means)}
            words = {key: f"{value:.4f}" for key, value in numbers.items()}
            yield {"arm": arm, "set": name} | words | {"seeds": str(len(means))}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, str]:
    """The mean difference; its 95% interval over windows, which both have, of the mean over seeds;
    and the lowest and highest seed's. What has no seed stands against every one."""
    seeds = sorted((one.keys() | other.keys()) - {""}) or [""]
    pairs = [
        [of[s if s in of else ""] for of in (one, other) if {s, ""} & of.keys()] for s in seeds
    ]
    each = [pair[0] - pair[1] for pair in pairs if len(pair) == 2]
    if not each:
        return {}
    by_window = np.mean(each, 0)
    error = by_window.std(ddof=1) / np.sqrt(len(by_window))
    half = error * student(len(by_window) - 1, 0.05)
    low, high = (f"{end(change.mean() for change in each):+.4f}" for end in (min, max))
    return {
        "difference": f"{by_window.mean():+.4f}",
        "half_interval": f"{half:.4f}",
        "lowest_seed": low,
        "highest_seed": high,
        "seeds": str(len(each)),
    }


def differences(losses: Losses) -> Iterator[dict[str, str]]:
    for arm, other in PAIRS:
        if arm in losses and other in losses:
            for name in losses[arm]:
                found = apart(losses[arm][name], losses[other][name])
                if found:
                    yield {"arm": arm, "minus": other, "set": name} | found


def tasks(out: Path) -> Iterator[dict[str, str]]:
    """lm_eval's rows, a column for the arm and one for the seed."""
    for path in sorted(out.glob("harness/*.csv")):
        arm, _, seed = path.stem.partition("_seed=")
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                del row["model"]
                yield {"arm": arm, "seed": seed} | row


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Each arm minus all tokens: text of the domain, and other text on a scale of its own."""
    rows = [row for row in rows if row["minus"] == "all"]
    arms, sets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("arm", "set"))
    change = {(row["arm"], row["set"]): float(row["difference"]) for row in rows}
    axes = Axis("", "set"), Axis("nats per token, minus all tokens", "difference")
    panels = []
    kinds = {"text of the domain": set(sets) - set(OTHER), "other text": OTHER}
    for title, names in {k: [n for n in sets if n in of] for k, of in kinds.items()}.items():
        bars = [
            Series(ARMS[arm], PALETTE[i], names, np.array([change[arm, n] for n in names]))
            for i, arm in enumerate(arms)
        ]
        panels.append(Panel(title, *axes, [one._replace(kind="bars") for one in bars]))
    heading = "Held-out loss of each arm minus that of all tokens, mean over seeds"
    draw(Figure(heading, panels, size=(5, 4)), path)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    write_csv(path, rows)
    if rows and len(rows) < 100:
        for row in [dict.fromkeys(rows[0]) | {key: key for key in rows[0]}, *rows]:
            print(*(f"{cell!s:>20}" for cell in row.values()))


def tables(out: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    rows = read(out)
    losses = losses_of(rows, sets_of(rows))
    write(folder / "losses.csv", rows)
    write(folder / "results.csv", [*results(losses)])
    write(folder / "differences.csv", changes := [*differences(losses)])
    if found := [*tasks(out)]:
        write(folder / "tasks.csv", found)
    figure(changes, folder / "figure.png")


if __name__ == "__main__":
    tables(Path(sys.argv[1]), Path(sys.argv[2]))
