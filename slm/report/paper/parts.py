"""What the figures for papers share: lines over training, in panels and tables; names, colours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis, Chooser, rule_name
from slm.dynamics.classes import CLASSES
from slm.errors import UserError
from slm.report.paper.plots import (
    COLOURS,
    TOKENS_AXIS,
    dress,
    plain,
    pyplot,
    save_figure,
    token_ticks,
)
from slm.store.files import write_csv

WIDTH = 6.8  # inches: the text of a page
# As on the page: H→L blue, L→L green.
CLASS_COLOURS = dict(zip(CLASSES, (COLOURS[1], COLOURS[3], COLOURS[0], COLOURS[2]), strict=True))
LOSS_AXIS = "loss (nats per token)"
MIN_LATE = 8  # points of a line that show its course without its start

Row = dict[str, Any]


def amounts(numbers: Sequence[int]) -> list[str]:
    """13.1M; in full where that does not tell them apart."""
    from matplotlib.ticker import EngFormatter

    short = [EngFormatter(sep="")(float(f"{number:.3g}")) for number in numbers]
    return short if len(set(short)) == len(short) else [f"{number:,}" for number in numbers]


def chooser_of(analysis: Analysis) -> Chooser:
    if analysis.chooser is None:
        rule = rule_name(analysis.store.plan["run"]["selection"])
        raise UserError(f"{analysis.store.folder} has no reference scores, {rule} needs them")
    return analysis.chooser


def finish(figure: Any, path: Path, rows: list[Row]) -> None:
    write_csv(path.with_suffix(".csv"), rows)
    save_figure(figure, path)
    pyplot().close(figure)


# ---- lines over training ------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a panel."""

    panel: str
    series: str  # in the table
    label: str  # in the legend
    colour: str
    tokens_seen: np.ndarray  # (n,)
    values: np.ndarray  # (n,), NaN where nothing was measured
    target: int | None = None  # of the token set, where the line is a token's
    mark: int | None = None  # index of a point to mark


def line_rows(lines: Sequence[Line], unit: str) -> list[Row]:
    """A row a measurement, in the order of drawing."""
    return [
        {
            "panel": line.panel,
            "series": line.series,
            "target": "" if line.target is None else line.target,
            "tokens_seen": int(seen),
            unit: float(value),
        }
        for line in lines
        for seen, value in zip(line.tokens_seen, line.values, strict=True)
        if not np.isnan(value)
    ]


def draw_panel(axes: Any, lines: Sequence[Line], title: str, width: float) -> None:
    for line in lines:
        thickness = 1.3 if len(line.values) < 200 else 0.8
        style = {"color": line.colour, "linewidth": thickness, "label": plain(line.label)}
        axes.plot(line.tokens_seen, line.values, **style)
        if line.mark is not None:
            point = line.tokens_seen[line.mark], line.values[line.mark]
            style = {"color": line.colour, "markeredgecolor": "white", "markersize": 8}
            axes.plot(*point, "o", zorder=3, **style)  # above all lines
    focus(axes, lines)
    token_ticks(axes, most=5 if width > 3 else 3)
    axes.set_xlabel(TOKENS_AXIS)
    axes.margins(x=0.02)
    dress(axes, title, width)


def focus(axes: Any, lines: Sequence[Line]) -> None:
    """Where the first twentieth of training dwarfs all the rest, it runs out of the panel.

    Not where lines have few points: they would leave their first behind.
    """
    end = max(line.tokens_seen[-1] for line in lines)
    late = [line.values[line.tokens_seen >= end / 20] for line in lines]
    if min(np.count_nonzero(~np.isnan(values)) for values in late) < MIN_LATE:
        return
    low, high = np.nanmin(np.concatenate(late)), np.nanmax(np.concatenate(late))
    if max(np.nanmax(line.values) for line in lines) - low > 2 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
