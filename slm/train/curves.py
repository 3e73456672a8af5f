"""What a run wrote, read back: its held-out losses, and which folders are runs."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slm.errors import UserError
from slm.evaluate.losses import WindowLosses
from slm.store.files import Json, read_json, write_csv

if TYPE_CHECKING:
    from pandas import DataFrame

PREFIX, SUFFIX = "heldout/", "/loss"  # of a set's column in heldout.csv
KEPT = "slm/kept_frac/"  # of a source's column in train.csv
CURVES = ("train", "heldout", "dynamics")  # tables that a run logs, a row a logged step
WINDOWS = "heldout_windows.csv"
USUAL = {"data.order": "permutation"}  # in run.json of earlier builds, which do not say


@dataclass(frozen=True)
class Run:
    """The folder of a run. It stands for itself wherever a folder of a run is asked for.

    model:    folder of the trained model, as `score` and `evaluate` take it
    curves:   "train", "heldout", "dynamics": what was logged, one row a logged step
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

        paths = {name: self.folder / f"{name}.csv" for name in CURVES}
        return {name: pd.read_csv(path) for name, path in paths.items() if path.exists()}

    @property
    def metrics(self) -> dict[str, float]:
        logged = [(name, table[name].dropna()) for table in self.curves.values() for name in table]
        return {str(name): float(column.iloc[-1]) for name, column in logged if len(column)}

    @property
    def kept_by_source(self) -> dict[str, float]:
        """The share of each source's targets that was selected, mean over the logged steps."""
        curves = self.curves
        means = curves["train"].filter(like=KEPT).mean().dropna() if "train" in curves else {}
        return {str(name).removeprefix(KEPT): float(mean) for name, mean in means.items()}


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


def write_window_losses(run: Path, tokens_seen: int, found: Mapping[str, WindowLosses]) -> None:
    """Of every held-out set; what was measured before training is kept beside them."""
    rows = [row for row in window_rows(run) if tokens_seen and row["tokens_seen"] == "0"]
    for name, losses in found.items():
        columns = zip(*(column.tolist() for column in losses), strict=True)
        where = {"set": name, "tokens_seen": tokens_seen}
        rows += [where | dict(zip(losses._fields, row, strict=True)) for row in columns]
    if rows:
        write_csv(run / WINDOWS, rows)


def read_window_losses(run: Path) -> dict[tuple[str, int], WindowLosses]:
    """By held-out set and tokens seen; nothing where the run wrote none."""
    groups: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    for row in window_rows(run):
        groups[row["set"], int(row["tokens_seen"])].append(row)
    kinds = {name: float if name == "nats" else int for name in WindowLosses._fields}
    return {
        key: WindowLosses(*(np.array([kind(row[n]) for row in rows]) for n, kind in kinds.items()))
        for key, rows in groups.items()
    }


def window_rows(run: Path) -> list[dict[str, Any]]:
    if not (run / WINDOWS).exists():
        return []
    with open(run / WINDOWS, newline="") as file:
        return list(csv.DictReader(file))


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
        runs = runs_below(folder)
        if not runs:
            raise UserError(f"{folder} holds no run (no run.json in it or below it)")
        found |= dict.fromkeys(runs)
    here = Path.cwd()
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in found]


def runs_below(folder: Path) -> list[Path]:
    """The runs in a folder or below it."""
    marks = [path for name in ("run.json", "status.json") for path in folder.rglob(name)]
    return sorted(path.parent.resolve() for path in marks)
