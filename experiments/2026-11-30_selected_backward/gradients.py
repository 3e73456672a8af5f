"""The angle between the exact and the selected gradient -> gradients.csv, angle.png.

python gradients.py RUNS CORPUS REFERENCES OUT      RUNS: finished runs with all their checkpoints

At each checkpoint of seed 0 both gradients of the same batches under the same selection: batches of
the training corpus, of as many windows as a training step has.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm.dynamics.colours import PALETTE
from slm.dynamics.command import checkpoints_of, load_checkpoint, tokens_seen_by
from slm.dynamics.figure import SEEN, Axis, Figure, Panel, Series
from slm.model.build import SelectiveLM
from slm.report.arms import Run, read_runs
from slm.report.paper.plots import draw
from slm.selection.rule import Selection
from slm.selection.rules import Excess
from slm.store.files import write_csv
from slm.store.shards import Corpus
from slm.store.windows import Batch, Windows, open_windows, spread

BATCHES, SIZE = 4, 32
MEASURES = {
    "cosine": "cosine of exact and selected gradient",
    "norm_ratio": "norm of selected / exact gradient",
    "cosine_of_batches": "cosine of two batches' exact gradients",
}


def gradient(
    lm: SelectiveLM, batch: Batch, rule: Selection, backward: str
) -> Tensor:  # (parameters,)
    lm.backward = backward
    weight, _ = rule.deferred(batch, 0)
    loss = lm(batch, weight, takes_all=rule.takes_all(0)).loss
    found = torch.autograd.grad(loss, [*lm.parameters()], materialize_grads=True)
    return torch.cat([one.flatten() for one in found]).double()


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def compared(lm: SelectiveLM, batches: list[Batch], rule: Selection) -> dict[str, Any]:
    """Means over batches, and over pairs of neighbouring batches."""
    exact, selected = (
        torch.stack([gradient(lm, batch, rule, backward) for batch in batches])
        for backward in ("exact", "selected")
    )
    cosines = [cosine(*pair) for pair in zip(exact, selected, strict=True)]
    return {
        "cosine": float(np.mean(cosines)),
        "norm_ratio": float((selected.norm(dim=1) / exact.norm(dim=1)).mean()),
        "cosine_of_batches": float(
            np.mean([cosine(*pair) for pair in zip(exact, exact[1:], strict=False)])
        ),
    }


def rows_of(run: Run, windows: Windows, batches: list[Batch]) -> list[dict[str, Any]]:
    rule = Excess(run.select_ratio)
    found = []
    for path in checkpoints_of(run.folder):
        lm = load_checkpoint(path, windows.corpus).train()
        about = {
            "select_ratio": run.select_ratio,
            "trained_with": run.identity["model.backward"],
            "tokens_seen": tokens_seen_by(path),
        }
        measured = compared(lm, batches, rule)
        found.append(about | {name: round(value, 4) for name, value in measured.items()})
    return found


def picture(rows: list[dict[str, Any]]) -> Figure:
    """A panel a measure, a colour a ratio; dashed: states that the selected gradient made."""
    panels = [
        Panel(title, SEEN, Axis("", name), lines(rows, name)) for name, title in MEASURES.items()
    ]
    return Figure("", panels, size=(4.6, 3.6), columns=3, lettered=True)


def lines(rows: list[dict[str, Any]], name: str) -> list[Series]:
    found = defaultdict(list)
    for row in rows:
        found[row["select_ratio"], row["trained_with"]].append((row["tokens_seen"], row[name]))
    colours = dict(zip(sorted({ratio for ratio, _ in found}), PALETTE, strict=False))
    drawn = []
    for (ratio, backward), points in sorted(found.items()):
        seen, values = zip(*sorted(points), strict=True)
        label = f"k = {ratio:g}, trained with {backward}"
        look = Series(label, colours[ratio], np.array(seen), np.array(values), mark="circle")
        drawn.append(look._replace(dash="dash" if backward == "selected" else "solid"))
    return drawn


def main() -> None:
    runs, corpus, references, out = sys.argv[1:]
    windows = open_windows(Corpus.open(corpus, "size"), references, None)
    chosen = spread(len(windows), BATCHES * SIZE).reshape(SIZE, BATCHES).T  # each from all sources
    batches = [windows.batch(one) for one in chosen]
    found, _ = read_runs([runs])
    first = [run for run in found if run.lineage["seed"] == 0]
    rows = [row for run in first for row in rows_of(run, windows, batches)]
    write_csv(Path(out) / "gradients.csv", rows)
    draw(picture(rows), Path(out) / "angle.png")


if __name__ == "__main__":
    main()
