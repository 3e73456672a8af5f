"""What a run wrote, read back: its held-out losses, and which folders are runs."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slm.errors import UserError
from slm.store.files import Json, read_json

if TYPE_CHECKING:
    from pandas import DataFrame

PREFIX, SUFFIX = "heldout/", "/loss"  # of a set's column in heldout.csv


@dataclass(frozen=True)
class Run:
    """The folder of a run. It stands for itself wherever a folder of a run is asked for.

    model:    folder of the trained model, as `score` and `evaluate` take it
    curves:   "train", "heldout": what was logged, one row a logged step
    metrics:  the last value of every column
    lineage:  what went in, what was counted
    """

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def lineage(self) -> Json:
        return read_json(self.folder / "lineage.json")

    @property
    def curves(self) -> "dict[str, DataFrame]":
        import pandas as pd  # half a second

        return {path.stem: pd.read_csv(path) for path in sorted(self.folder.glob("*.csv"))}

    @property
    def metrics(self) -> dict[str, float]:
        logged = [(name, table[name].dropna()) for table in self.curves.values() for name in table]
        return {str(name): float(column.iloc[-1]) for name, column in logged if len(column)}


class Curve(NamedTuple):
    """One run's held-out loss over training."""

    label: str
    tokens_seen: np.ndarray  # (n,)
    loss: np.ndarray  # (n,), nats


def read_curve(run: Path, label: str, name: str) -> Curve:
    """The loss on the held-out set `name` from the run's heldout.csv."""
    column = f"{PREFIX}{name}{SUFFIX}"
    with open(run / "heldout.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    seen = np.array([float(row["tokens_seen"]) for row in rows])
    return Curve(label, seen, np.array([float(row[column]) for row in rows]))


def heldout_sets(run: Path) -> list[str]:
    """Names of the held-out sets in the run's heldout.csv: whatever is between, slashes too."""
    with open(run / "heldout.csv", newline="") as file:
        columns = csv.DictReader(file).fieldnames or []
    mine = [column for column in columns if column.startswith(PREFIX) and column.endswith(SUFFIX)]
    return [column.removeprefix(PREFIX).removesuffix(SUFFIX) for column in mine]


def final_losses(run: Path) -> dict[str, float]:
    """The last loss on every held-out set; nothing where the run wrote no heldout.csv."""
    names = heldout_sets(run) if (run / "heldout.csv").exists() else []
    return {name: float(read_curve(run, "", name).loss[-1]) for name in names}


def by_label(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[curve.label].append(curve)
    return groups


def mean_curve(runs: Sequence[Curve]) -> Curve:
    """At the first one's points."""
    seen = runs[0].tokens_seen
    losses = [np.interp(seen, run.tokens_seen, run.loss) for run in runs]
    return Curve(runs[0].label, seen, np.mean(losses, axis=0))


def folders_of(value: Any) -> list[str]:
    """The configuration's `runs`."""
    return [value] if isinstance(value, str) else list(value)


def run_folders(folders: Sequence[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        marks = [path for name in ("run.json", "status.json") for path in folder.rglob(name)]
        if not marks:
            raise UserError(f"{folder} holds no run (no run.json in it or below it)")
        found |= dict.fromkeys(sorted(path.parent.resolve() for path in marks))
    here = Path.cwd()
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in found]
