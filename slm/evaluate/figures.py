"""Figures beside the CSV files of `slm evaluate` and `slm needle`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm.store.files import Json, atomic_file

PANEL = (4.2, 3.2)  # inches
COLOURS = ("#0072b2", "#d55e00", "#00805c", "#b0508a", "#c27c00", "#3d9bd1", "#6b6e73")  # Okabe-Ito
STYLES = ("-", "--", ":", "-.")  # beyond the colours


def panels(rows: int, columns: int) -> tuple[Any, np.ndarray]:  # (rows, columns) of axes
    from matplotlib.figure import Figure  # a command that draws nothing need not wait for it

    size = (PANEL[0] * columns, PANEL[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> Path:
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)
    return path


def plain(text: str) -> str:
    """Dollars in names start no formula."""
    return text.replace("$", r"\$")


def named(rows: Sequence[Json], key: str) -> list[Any]:
    """The different values, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def draw_positions(rows: Sequence[Json], path: Path) -> Path:
    """Loss over position, a panel a set and a line a model; rows: those of ranges."""
    sets, models = named(rows, "set"), named(rows, "model")
    figure, axes = panels(1, len(sets))
    for panel, name in zip(axes[0], sets, strict=True):
        for number, model in enumerate(models):
            mine = [row for row in rows if (row["set"], row["model"]) == (name, model)]
            ends = [mine[0]["from_position"], *(row["to_position"] for row in mine)]
            style, colour = divmod(number, len(COLOURS))
            look: Json = {"color": COLOURS[colour], "linestyle": STYLES[style % len(STYLES)]}
            values = [row["loss"] for row in mine]
            panel.stairs(values, ends, baseline=None, label=plain(model), **look)
        panel.set_xscale("symlog", base=2, linthresh=min(row["to_position"] for row in rows))
        ticks = sorted({row["to_position"] for row in rows if row["set"] == name})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.set(title=plain(name), xlabel="position in the window (tokens)")
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return save(figure, path)


def draw_needles(rows: Sequence[Json], path: Path) -> Path:
    """A heat map a model and set: share of values found, by length and depth."""
    kinds = list(dict.fromkeys((row["set"], row["model"]) for row in rows))
    lengths, depths = named(rows, "length"), named(rows, "depth")
    columns = min(4, len(kinds))
    figure, axes = panels(-(-len(kinds) // columns), columns)
    image = None
    for panel, kind in zip(axes.flat, kinds, strict=False):
        mine = [row["accuracy"] for row in rows if (row["set"], row["model"]) == kind]
        grid = np.reshape(mine, (len(lengths), len(depths))).T
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="upper")
        for (row, column), value in np.ndenumerate(grid):
            shade = "white" if value < 0.5 else "black"
            panel.text(column, row, f"{value:.0%}", ha="center", va="center", color=shade)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        title = kind[1] if len(named(rows, "set")) == 1 else f"{kind[1]}, {kind[0]}"
        panel.set(title=plain(title), xlabel="length (tokens)", ylabel="depth of the needle")
    for panel in axes.flat[len(kinds) :]:
        panel.set_axis_off()
    chance = rows[0]["chance"]
    figure.colorbar(image, ax=axes, label=f"values found (chance: {chance:.0%})")
    return save(figure, path)
