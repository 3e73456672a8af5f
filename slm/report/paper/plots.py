"""Figures from stored tables.

Nothing here looks at a live run: the input is heldout.csv of each run.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.store.files import atomic_file
from slm.train.curves import Curve, by_label, mean_curve

# Okabe and Ito's palette: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

DASHES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
LOOKS = tuple(zip(COLOURS, "osD^vPX", strict=True))  # colours and markers of rules
TOKENS_AXIS, LOSS_AXIS = "training tokens seen", "held-out loss (nats per token)"
LEGEND_SIZE, TITLE_SIZE = 9, 11  # points


def draw_curves(axes: Any, runs: Sequence[Curve], start: float, **style: Any) -> None:
    """A thin line a run, a thick one for their mean, which has the label."""
    thin = {key: value for key, value in style.items() if key != "label"}
    mean = mean_curve(runs)
    for curve, look in [
        *((run, thin | {"linewidth": 0.7, "alpha": 0.45}) for run in runs),
        (mean, {"linewidth": 2} | style),
    ]:
        keep = curve.tokens_seen >= start
        axes.plot(curve.tokens_seen[keep], curve.loss[keep], **look)


def draw_lines(
    axes: Any,
    lines: dict[str, float],
    labels: dict[str, str],
    colours: Sequence[str] = ("#555555",),
) -> None:
    """Horizontal lines, told apart by their dashes."""
    for (name, value), style, colour in zip(lines.items(), cycle(DASHES), cycle(colours)):  # noqa: B905  # cycles have no end
        axes.axhline(value, color=colour, linestyle=style, label=plain(labels[name]), linewidth=1.2)


def save_figure(figure: Any, path: Path) -> None:
    """As path and, for print, as SVG beside it; the same figure gives the same bytes."""
    import matplotlib

    save_picture(figure, path)
    with matplotlib.rc_context({"svg.hashsalt": "slm"}):  # ids in the SVG are random otherwise
        save_picture(figure, path.with_suffix(".svg"), metadata={"Date": None})


def save_picture(figure: Any, path: Path, **more: Any) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=160, **more)


def loss_figure(
    curves: Sequence[Curve], lines: dict[str, float], title: str, path: Path, start: float = 0.0
) -> None:
    """Loss against tokens: one colour a label, a thin line a run, a thick one their mean.

    lines:  horizontal lines, e.g. the reference model's own loss
    start:  leave out what lies before so many tokens (the first points dwarf the rest)
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for (label, runs), colour in zip(by_label(curves).items(), COLOURS, strict=False):
        text = f"{label} ({mean_curve(runs).loss[-1]:.3f})"
        draw_curves(axes, runs, start, color=colour, label=plain(text))
    draw_lines(axes, lines, {name: f"{name} ({value:.3f})" for name, value in lines.items()})
    axes.set(xlabel=TOKENS_AXIS, ylabel=LOSS_AXIS)
    token_ticks(axes)
    dress(axes, title, width=6.4)
    shared_legend(figure, [axes], None, most=3)
    save_picture(figure, path)
    plt.close(figure)


class RatioPanel(NamedTuple):
    """Final loss on one held-out set against select_ratio."""

    title: str
    rules: dict[str, list[tuple[float, list[float]]]]  # label: (select_ratio, loss of each seed)
    flat: dict[str, float]  # rules without a ratio: lines in colour
    lines: dict[str, float]  # controls and baselines: lines in grey


class TokensPanel(NamedTuple):
    """Loss during training on one held-out set."""

    title: str
    curves: list[Curve]  # one colour a label, from the first (light) to the last (dark)
    controls: list[Curve]  # black and dashed


def ratio_figure(panels: Sequence[RatioPanel], path: Path) -> None:
    """A panel a set: the mean over seeds with the range as a band, the controls as lines."""
    plt = pyplot()
    figure, grid = plt.subplots(
        1, len(panels), figsize=(1.6 + 4.4 * len(panels), 4.6), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        for (label, points), look in zip(panel.rules.items(), cycle(LOOKS)):  # noqa: B905
            draw_ratios(axes, sorted(points), label, *look)
        draw_lines(axes, panel.flat, {name: name for name in panel.flat}, COLOURS[::-1])
        draw_lines(axes, panel.lines, {name: name for name in panel.lines})
        ratios = {ratio for points in panel.rules.values() for ratio, _ in points}
        axes.set(xlabel="select_ratio (k): share of tokens trained on")
        axes.set_xticks(sorted(ratios))
        dress(axes, panel.title, width=3.8)
    grid[0][0].set_ylabel(f"final {LOSS_AXIS}")
    shared_legend(figure, grid[0], "points: mean over seeds, bands: lowest to highest")
    save_figure(figure, path)
    plt.close(figure)


def draw_ratios(
    axes: Any, points: list[tuple[float, list[float]]], label: str, colour: str, marker: str
) -> None:
    ratios = [ratio for ratio, _ in points]
    means = [float(np.mean(losses)) for _, losses in points]
    axes.plot(ratios, means, color=colour, marker=marker, linewidth=2, label=plain(label))
    low, high = ([find(losses) for _, losses in points] for find in (min, max))
    axes.fill_between(ratios, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.vlines(ratios, low, high, color=colour)  # a band of one point has no area


def tokens_figure(grid: Sequence[Sequence[TokensPanel]], path: Path) -> None:
    """The panels of a set share their axis; at most four stand side by side.

    The first measurement, before any training, is left out.
    """
    plt = pyplot()
    columns = min(4, len(grid[0]))
    rows = math.ceil(len(grid[0]) / columns)
    size = (1.2 + 4.0 * columns, 1.2 + 3.0 * rows * len(grid))
    figure, places = plt.subplots(
        rows * len(grid), columns, figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    labels = sorted({curve.label for row in grid for panel in row for curve in panel.curves})
    middles = (np.arange(len(labels)) + 0.5) / max(1, len(labels))
    shades = plt.get_cmap("viridis")(0.85 - 0.75 * middles)  # the ends are too pale, too black
    for number, panels in enumerate(grid):
        mine = places[number * rows : (number + 1) * rows].flat
        draw_set(list(mine), panels, dict(zip(labels, shades, strict=True)))
    figure.supylabel(LOSS_AXIS, fontsize=10)
    shared_legend(figure, places.flat, "thin lines: seeds, thick lines: their mean")
    save_figure(figure, path)
    plt.close(figure)


def draw_set(places: list[Any], panels: Sequence[TokensPanel], shades: dict[str, Any]) -> None:
    for axes in places[1:]:
        axes.sharey(places[0])
    for axes, panel in zip(places, panels, strict=False):
        draw_tokens(axes, panel, shades)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes in places[max(0, len(panels) - 4) : len(panels)]:  # the lowest of each column
        axes.set_xlabel(TOKENS_AXIS)
        axes.tick_params(labelbottom=True)


def draw_tokens(axes: Any, panel: TokensPanel, shades: dict[str, Any]) -> None:
    start = panel.curves[0].tokens_seen[:2].max()
    for label, runs in by_label(panel.curves).items():
        draw_curves(axes, runs, start, color=shades[label], label=plain(label))
    for label, runs in by_label(panel.controls).items():
        draw_curves(axes, runs, start, color="#000000", linestyle="--", label=plain(label))
    token_ticks(axes)
    dress(axes, panel.title, width=3.3)


def plain(text: str) -> str:
    """Dollars in names and tokens start no formula."""
    return text.replace("$", r"\$")


def dress(axes: Any, title: str, width: float) -> None:
    """The title at the left, wrapped to so many inches; no frame."""
    text = textwrap.fill(plain(title), characters(width, TITLE_SIZE))
    axes.set_title(text, loc="left", fontsize=TITLE_SIZE)
    axes.spines[["top", "right"]].set_visible(False)


def token_ticks(axes: Any, most: int = 5) -> None:
    """50k, 100k, 1.5M"""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


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
    """matplotlib costs a second, and no display is needed to write a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
