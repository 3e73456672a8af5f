"""A figure as data: its words, its axes, and what is drawn in which colour.

    Series   in one colour: a line, points or bars, with an interval where there is one
    Panel    series on two axes
    Figure   panels side by side

One definition is drawn by slm/report/paper/plots.py (matplotlib) and slm/report/page/plots.py
(Plotly), logged to W&B (wandb_media.py), and written as a table, so that others can draw it anew.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.colours import PALETTE, Colour
from slm.train.curves import Curve, mean_curve

Row = dict[str, Any]
MARKS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


class Axis(NamedTuple):
    title: str
    column: str  # of the table
    kind: str = "number"  # or tokens, share
    from_zero: bool = False
    bounds: tuple[float, float] | None = None  # shown at first; None: all there is
    ticks: Sequence[float] = ()


SEEN = Axis("training tokens seen", "tokens_seen", "tokens")
LOSS = Axis("loss (nats per token)", "loss_nats")
HELDOUT_LOSS = Axis("held-out loss (nats per token)", "loss_nats")


def share(title: str) -> Axis:
    return Axis(title, "share", "share", from_zero=True)


class Series(NamedTuple):
    name: str  # in the table
    colour: Colour
    x: Any  # (n,) numbers, or n words
    y: np.ndarray  # (n,), NaN where nothing was measured
    label: str | None = None  # in the legend; None: the name, "": not there
    low: np.ndarray | None = None  # (n,)
    high: np.ndarray | None = None
    kind: str = "line"  # or points, bars
    mark: str = ""  # one of MARKS, "": none
    dash: str = "solid"
    width: float = 2.0
    is_seed: bool = False  # thin and pale: one of the runs behind a mean, not in the legend
    note: str = ""  # of the label, where there is room
    target: int | None = None  # of the token set, where the series is a token's
    at: int | None = None  # index of a point that stands out

    @property
    def text(self) -> str:
        return self.name if self.label is None else self.label


class Panel(NamedTuple):
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    name: str = ""  # in the table, "": its title
    group: str = ""  # with whom it stays where all are too many for one picture
    stacked: bool = False  # bars; else they stand side by side
    note: str = ""  # below it, on the page


class Figure(NamedTuple):
    """What it looks like in print is said here too: sizes are inches."""

    heading: str
    panels: Sequence[Panel]
    caption: str = ""
    size: tuple[float, float] = (4.4, 3.2)  # of a panel
    columns: int = 4  # panels side by side, at most
    lettered: bool = False  # (a), (b)
    own_legends: bool = False  # a legend below each panel
    legend_title: str = ""


def one_panel(
    heading: str, y: Axis, series: Sequence[Series], caption: str = "", x: Axis = SEEN
) -> Figure:
    return Figure(heading, [Panel("", x, y, series)], caption)


def nth_series(index: int, name: str, x: Any, y: np.ndarray, label: str | None = None) -> Series:
    """Told apart by colour and mark, and by dashes when all colours are used."""
    turn, place = divmod(index, len(PALETTE))
    return Series(name, PALETTE[place], x, y, label)._replace(
        mark=MARKS[place], dash=DASHES[turn % len(DASHES)]
    )


def seed_series(runs: Sequence[Curve], look: Series) -> list[Series]:
    """Thin lines of the seeds, where there are several, and a thick one of their mean."""
    mean = mean_curve(runs)
    thin = look._replace(is_seed=True, width=0.8, mark="")
    seeds = [thin._replace(x=run.tokens_seen, y=run.loss) for run in runs if len(runs) > 1]
    return [*seeds, look._replace(x=mean.tokens_seen, y=mean.loss)]


def picks(count: int, most: int) -> np.ndarray:
    """At most so many of `count` indices, spread evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def decimals(spread: float) -> int:
    """Of a number that is known to `spread`: the spread's first two digits; 4 where it is 0."""
    return min(5, max(0, 1 - math.floor(math.log10(spread)))) if spread > 0 else 4


def amounts(numbers: Sequence[int]) -> list[str]:
    """13.1M; in full where that does not tell them apart."""
    from matplotlib.ticker import EngFormatter

    short = [EngFormatter(sep="")(float(f"{number:.3g}")) for number in numbers]
    return short if len(set(short)) == len(short) else [f"{number:,}" for number in numbers]


def table(figure: Figure) -> list[Row]:
    """A row a measurement, in the order of drawing."""
    found = [
        {
            "panel": panel.name or panel.title,
            "series": one.name,
            "target": "" if one.target is None else one.target,
            panel.x.column: plain_number(one.x[index]),
            panel.y.column: float(value),
        }
        | ({} if one.low is None else {"low": float(one.low[index])})
        | ({} if one.high is None else {"high": float(one.high[index])})
        for panel in figure.panels
        for one in panel.series
        for index, value in enumerate(one.y)
        if not np.isnan(value)
    ]
    columns = dict.fromkeys((key for row in found for key in row), "")
    return [columns | row for row in found]


def plain_number(value: Any) -> Any:
    """40960, 0.6 or a word."""
    if isinstance(value, str):
        return value
    return int(value) if float(value).is_integer() else float(value)
