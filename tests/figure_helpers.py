"""A small store of losses over wild text, and readers of the tables that figures leave."""

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer

from slm.dynamics.analysis import Analysis, analyse
from slm.dynamics.token_set import TokenSet
from slm.dynamics.trajectories import TrajectoryStore

EXCESS = {"_target_": "slm.selection.Excess", "select_ratio": 0.5, "scope": "batch"}
RANDOM = {"_target_": "slm.selection.Random", "select_ratio": 0.5, "scope": "batch", "seed": 1}
ALL = {"_target_": "slm.selection.All"}
SMILE = "\U0001f600".encode()
PIECES = [
    b" the",
    b" $x^2$",
    b"\n",
    SMILE[:2],
    SMILE[2:],
    "\u0627\u0644".encode(),
    b"\xc3",
    b"\xa9",
]
PIECES += [b"$", b"\t", b"\x00", b"\xff", "\u4e2d".encode(), b"_", b"\\frac{", b"<|endoftext|>"]
W, T = 6, 16
BATCH = 2  # windows that are ranked together

Make = Callable[..., Analysis]  # make_analysis in a folder of its own


def losses_of(seed: int, checkpoints: int) -> np.ndarray:  # (C, M)
    """A quarter each rises, falls, stays high and stays low."""
    rng, kind = np.random.default_rng(seed), np.arange(W * T - 3) % 4
    level = np.choose(kind, [1.0, 3.0, 5.0, 0.5]) + rng.uniform(0, 0.3, len(kind))
    slope = np.choose(kind, [1.5, -1.5, 0.0, 0.0])
    x = np.linspace(0, 1, checkpoints)[:, None]
    noise = rng.normal(0, 0.05, (checkpoints, len(kind)))
    return np.abs(level + slope * x + noise).astype(np.float32)


def make_analysis(
    folder: Path,
    name="run",
    selection=EXCESS,
    losses: np.ndarray | None = None,
    references=True,
    start=0,
    every=100_000,
    plan: dict[str, Any] | None = None,
) -> Analysis:
    rng = np.random.default_rng(0)
    live = np.ones((W, T), bool)
    live[1, :3] = False  # a prompt
    columns: dict[str, np.ndarray] = {"source": np.zeros(W * T - 3, np.uint16)}
    if references:
        columns["reference_loss"] = rng.uniform(0, 3, W * T - 3).astype(np.float32)
    ids = rng.integers(0, len(PIECES), (W, T + 1)).astype(np.uint32)
    ids[0, :16] = np.arange(16)
    tokens = TokenSet(np.arange(W) * 10, ids, live, columns, dict(enumerate(PIECES)))
    run = {"seed": 0, "selection": selection, "selection_start": start, "micro_batch_size": BATCH}
    body = {"format": 1, "kind": "dynamics", "corpus_fingerprint": "c0", "sources": ["a"]}
    body |= {"windows_sha256": "w0", "run": run} | (plan or {})
    store = TrajectoryStore.create(folder / f"store-{name}".replace("/", "_"), body, tokens)
    for index, column in enumerate(losses_of(0, 5) if losses is None else losses):
        store.append(every * index, column)
    return analyse(store, name)


def masks_of(analysis: Analysis) -> list[np.ndarray]:
    """Of the rule EXCESS, by sorting; C arrays (M,)."""
    reference, live = analysis.tokens.columns["reference_loss"], analysis.tokens.live
    found = []
    for column in analysis.losses:
        grid = np.full((W, T), -np.inf)
        grid[live] = column.astype(np.float64) - reference
        mask = np.zeros((W, T), bool)
        for start in range(0, W, BATCH):
            rows = slice(start, start + BATCH)
            count = int(live[rows].sum() * 0.5 + 0.5)
            mask[rows] = grid[rows] >= np.sort(grid[rows], axis=None)[-count]
        found.append(mask[live])
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines_of(path: Path, unit: str = "loss_nats") -> dict[tuple[str, str], dict[int, float]]:
    """(panel, series or target): tokens seen: value"""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows_of(path):
        key = row["panel"], row["target"] or row["series"]
        found[key][int(row["tokens_seen"])] = float(row[unit])
    return found


def drawn_of(axes: Any) -> list[tuple[list[float], list[float]]]:
    """The lines of a panel, without the points that stand out."""
    lines = [line for line in axes.lines if line.get_zorder() < 3]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def assert_drawn(axes: Any, expected: list[dict[int, float]]) -> None:
    for (x, y), line in zip(drawn_of(axes), expected, strict=True):
        assert x == list(line) and y == pytest.approx(list(line.values()))


def assert_files(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in path.with_suffix(".svg").read_text(encoding="utf-8")


def values_of(axes: Any) -> list[list[float]]:
    """What the lines and bars of a panel measure."""
    groups = [group for group in axes.containers if isinstance(group, BarContainer)]
    bars = [[bar.get_height() for bar in group] for group in groups]
    return bars or [[y for y in ys if not np.isnan(y)] for _, ys in drawn_of(axes)]
