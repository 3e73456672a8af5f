"""Figures for print: what figure.py defines, drawn with matplotlib; and the curves of runs.

Nothing here looks at a live run: the input is heldout.csv of each run.
"""

import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from slm.dynamics.figure import DASHES, MARKS, Axis, Figure, Panel, Series, table
from slm.report.paper.excerpts import FONT, legend_text
from slm.store.files import atomic_file, write_csv

MARKERS: dict[str, str] = dict(zip(MARKS, "osD^vPX", strict=True))
STYLES: dict[str, Any] = dict(
    zip(DASHES, ("-", "--", ":", "-.", (0, (7, 3)), (0, (7, 3, 1, 3))), strict=True)
)
HATCHES: dict[str, str] = dict(zip(DASHES, ("", "//", "..", "xx", "--", "||"), strict=True))
LEGEND_SIZE, TITLE_SIZE = 9, 11  # points
DPI = 160
MIN_LATE = 8  # points of a line that show its course without its start


# ---- drawing ------------------------------------------------------------------------------------


def draw(figure: Figure, path: Path) -> None:
    """As path, a PNG, as SVG beside it, and what is drawn as CSV."""
    plt = pyplot()
    columns = min(figure.columns, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    width, height = figure.size
    size = (width * columns, height * rows)
    drawn, places = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in places.flat[len(figure.panels) :]:
        axes.set_visible(False)
    for number, (axes, panel) in enumerate(zip(places.flat, figure.panels, strict=False)):
        letter = f"({ascii_lowercase[number]}) " if figure.lettered else ""
        draw_panel(axes, panel, letter + (panel.title or figure.heading), 0.85 * width)
        if number % columns == 0:
            axes.set_ylabel(panel.y.title)
        if figure.own_legends and panel.series:
            own_legend(axes, is_text=panel.series[0].target is not None)
    if not figure.own_legends:
        shared_legend(drawn, places.flat, figure.legend_title or None, most=3 if columns < 2 else 5)
    if rows_of_table := table(figure):
        write_csv(path.with_suffix(".csv"), rows_of_table)
    save_figure(drawn, path)
    plt.close(drawn)


def draw_panel(axes: Any, panel: Panel, title: str, width: float) -> None:
    """A panel without series has a title alone, which says so."""
    if not panel.series:
        axes.axis("off")
        dress(axes, title, width)
        return
    draw_bars(axes, panel)
    for one in panel.series:
        if one.kind != "bars":
            (draw_line if one.kind == "line" else draw_points)(axes, one)
    focus(axes, panel)
    dress_axis(axes.xaxis, panel.x, most=5 if width > 3 else 3)
    dress_axis(axes.yaxis, panel.y)
    axes.set_xlabel(panel.x.title)
    axes.margins(x=0.02)
    if panel.y.bounds is not None:
        axes.set_ylim(*panel.y.bounds)
    elif panel.y.from_zero:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    dress(axes, title, width)


def draw_line(axes: Any, one: Series) -> None:
    """With a band where it has an interval, and a line where a band of one point has no area."""
    width = 0.75 * one.width * (1 if len(one.y) < 200 else 0.6)  # points, of CSS pixels
    style: dict[str, Any] = {"color": one.colour.light, "linewidth": width}
    style |= {"linestyle": STYLES[one.dash], "alpha": 0.45 if one.is_seed else 1.0}
    if one.mark:
        style |= {"marker": MARKERS[one.mark], "markevery": math.ceil(len(one.y) / 10)}
        style |= {"markersize": 5}
    axes.plot(one.x, one.y, label=label_of(one), **style)
    if one.low is not None and one.high is not None:
        axes.fill_between(one.x, one.low, one.high, color=one.colour.light, alpha=0.2, linewidth=0)
        axes.vlines(one.x, one.low, one.high, color=one.colour.light)
    if one.at is not None:  # above all lines
        look: Any = {"color": one.colour.light, "markeredgecolor": "white", "markersize": 8}
        axes.plot(one.x[one.at], one.y[one.at], "o", zorder=3, **look)


def draw_points(axes: Any, one: Series) -> None:
    look: Any = {"color": one.colour.light, "linestyle": "none", "markersize": 7, "capsize": 2}
    axes.errorbar(one.x, one.y, ends_of(one), marker=MARKERS[one.mark or "circle"], **look)


def draw_bars(axes: Any, panel: Panel) -> None:
    """On top of each other, as wide as their distance; or side by side over words."""
    mine = [one for one in panel.series if one.kind == "bars"]
    below: Any = 0.0
    for number, one in enumerate(mine):
        look: Any = {"color": one.colour.light, "label": label_of(one), "hatch": HATCHES[one.dash]}
        if panel.stacked:
            axes.bar(one.x, one.y, one.x[1] - one.x[0], below, **look)
            below = below + one.y
        else:
            places = np.arange(len(one.x)) + 0.75 * ((number + 0.5) / len(mine) - 0.5)
            axes.bar(places, one.y, 0.75 / len(mine), yerr=ends_of(one), **look)
            axes.set_xticks(range(len(one.x)), one.x)


def ends_of(one: Series) -> list[np.ndarray] | None:
    if one.low is None or one.high is None:
        return None
    return [one.y - one.low, one.high - one.y]


def label_of(one: Series) -> str | None:
    if one.is_seed or not one.text:
        return None
    return plain(one.text if one.target is None else legend_text(one.text))


def focus(axes: Any, panel: Panel) -> None:
    """Where the first twentieth of training dwarfs all the rest, it runs out of the panel.

    Not where lines have few points: they would leave their first behind.
    """
    if panel.x.kind != "tokens" or panel.y.bounds is not None:
        return
    lines = [one for one in panel.series if one.kind == "line"]
    end = max(one.x[-1] for one in lines)
    late = [one.y[one.x >= end / 20] for one in lines]
    if min(np.count_nonzero(~np.isnan(values)) for values in late) < MIN_LATE:
        return
    low, high = np.nanmin(np.concatenate(late)), np.nanmax(np.concatenate(late))
    if max(np.nanmax(one.y) for one in lines) - low > 2 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def dress_axis(axis: Any, found: Axis, most: int = 5) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    if found.kind == "tokens":  # 50k, 100k, 1.5M
        axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(EngFormatter(sep=""))
    if found.kind == "share":
        axis.set_major_formatter(PercentFormatter(1.0))
    if found.ticks:
        axis.set_ticks(found.ticks)


def own_legend(axes: Any, is_text: bool) -> None:
    """Below the panel, where it hides no line."""
    font = {"size": LEGEND_SIZE - 1} | ({"family": FONT} if is_text else {})
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False, prop=font)


def save_figure(figure: Any, path: Path) -> None:
    """As path and, for print, as SVG beside it; the same figure gives the same bytes."""
    import matplotlib

    lay_out(figure)
    save_picture(figure, path)
    with matplotlib.rc_context({"svg.hashsalt": "slm"}):  # ids in the SVG are random otherwise
        save_picture(figure, path.with_suffix(".svg"), metadata={"Date": None})


def lay_out(figure: Any) -> None:
    """For both files, where each would do it anew: it takes longer than to draw them.

    Twice: in panels of another size an axis may have other ticks, with wider labels.
    """
    if engine := figure.get_layout_engine():
        figure.set_dpi(DPI)
        engine.execute(figure)
        engine.execute(figure)
        figure.set_layout_engine(None)


def save_picture(figure: Any, path: Path, **more: Any) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=DPI, **more)


def plain(text: str) -> str:
    """Dollars in names and tokens start no formula."""
    return text.replace("$", r"\$")


def dress(axes: Any, title: str, width: float) -> None:
    """The title at the left, wrapped to so many inches; no frame."""
    text = textwrap.fill(plain(title), characters(width, TITLE_SIZE))
    axes.set_title(text, loc="left", fontsize=TITLE_SIZE)
    axes.spines[["top", "right"]].set_visible(False)


def characters(width: float, size: float) -> int:
    """How many of a font of `size` points fit into so many inches, on the safe side."""
    return int(width * 72 / (0.62 * size))


def shared_legend(figure: Any, places: Iterable[Any], note: str | None, most: int = 5) -> None:
    """Every label once, below the panels; in as many columns as fit, and the figure grows by it."""
    found: dict[str, Any] = {}
    for axes in places:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    width, height = figure.get_size_inches()
    texts = [textwrap.fill(label, min(44, characters(width - 1, LEGEND_SIZE))) for label in found]
    columns = legend_columns(texts, width, most)
    lines = sum(text.count("\n") + 1 for text in texts) / columns
    figure.set_size_inches(width, height + max(0.0, lines - 2) * 1.5 * LEGEND_SIZE / 72)
    style: Any = {"loc": "outside lower center", "frameon": False, "fontsize": LEGEND_SIZE}
    title = note and textwrap.fill(note, characters(width, LEGEND_SIZE))
    handles = list(found.values())
    figure.legend(handles, texts, title=title, title_fontsize=9, ncols=columns, **style)


def legend_columns(texts: Sequence[str], width: float, most: int) -> int:
    """A column is as wide as its longest line and its handle, which is some eight letters."""
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    return max(1, min(most, characters(width, LEGEND_SIZE) // (longest + 8)))


def pyplot() -> Any:
    """matplotlib costs a second, and no display is needed to write a file.

    A notebook names in the environment how it shows figures, its user's too: that stays.
    """
    import matplotlib

    if "MPLBACKEND" not in os.environ:
        matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
