"""The page's figures as plain Plotly dictionaries: one run's and several runs'.

Colours are the names of the style sheet's variables, e.g. `var(--HH)`; the script puts in what they
are in light or dark. Plotly reads a little markup in texts, so names go through `plain`.
"""

import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slm.dynamics.analysis import Analysis, histogram
from slm.dynamics.classes import ARROWS, CLASSES
from slm.report.page.tokens import numbers
from slm.report.paper.plots import TOKENS_AXIS
from slm.store.files import Json

MAX_POINTS = 200  # of a line
MAX_SOURCES = 10  # lines of sources: the largest
BINS = 60
# Up and down as the loss goes: a second cue beside the colour.
CLASS_MARKS = {"HH": "square", "LH": "triangle-up", "HL": "triangle-down", "LL": "circle"}
MARKS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
NUM_COLOURS = 7  # --c0 ... --c6


# ---- parts --------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Plotly takes <b>, <a> and entities for markup."""
    return html.escape(text, quote=False)


def colour(index: int) -> str:
    return f"var(--c{index % NUM_COLOURS})"


def picks(count: int, most: int = MAX_POINTS) -> np.ndarray:
    """At most so many of `count` checkpoints, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def line(
    name: str, x: np.ndarray, y: np.ndarray, shade: str, mark: str | None = None, **more: Any
) -> Json:
    """Thinned out alike for all lines of one length."""
    kept = picks(len(x))
    trace = {
        "type": "scatter",
        "mode": "lines",
        "name": plain(name),
        "x": [int(seen) if float(seen).is_integer() else float(seen) for seen in x[kept]],
        "y": numbers(y[kept], 4),
        "line": {"color": shade, "width": 2},
    }
    if mark is not None:
        marker = {"symbol": mark, "size": 9 if "triangle" in mark else 7, "maxdisplayed": 10}
        trace |= {"mode": "lines+markers", "marker": marker}
    return trace | more


def figure(traces: Iterable[Json], x: Json | str, y: Json | str, **layout: Any) -> Json:
    """An axis is its title, or a dictionary with more."""
    axes = {"xaxis": axis(x), "yaxis": axis(y)}
    return {"data": list(traces), "layout": axes | layout}


def axis(value: Json | str) -> Json:
    return {"title": {"text": value}} if isinstance(value, str) else value


def titled(text: str, **more: Any) -> Json:
    return {"title": {"text": text}} | more


SHARE = {"tickformat": ".0%", "hoverformat": ".1%", "rangemode": "tozero"}
SEEN_AXIS = titled(TOKENS_AXIS, tickformat="~s")
NATS = "loss (nats per token)"


# ---- one run ------------------------------------------------------------------------------------


def run_figures(analysis: Analysis) -> Json:
    """Name -> figure; the ones that need scores only where there are any."""
    found = {"shares": shares(analysis), "losses": losses(analysis)}
    if analysis.kept is not None:
        found |= {
            "kept_class": kept_class(analysis),
            "kept_source": kept_source(analysis),
            "kept_loss": kept_loss(analysis),
        }
    return found


def shares(analysis: Analysis) -> Json:
    """Provisional shares thin, the final ones as points with their intervals."""
    traces = []
    for index, name in enumerate(CLASSES):
        shade, label = f"var(--{name})", ARROWS[name]
        style = {"line": {"color": shade, "width": 1.5}, "legendgroup": name}
        history = analysis.share_history[:, index]
        traces.append(line(label, analysis.tokens_seen, history, shade, CLASS_MARKS[name], **style))
        traces.append(final_share(analysis, name) | {"legendgroup": name})
    return figure(traces, SEEN_AXIS, titled("share of tokens", **SHARE))


def final_share(analysis: Analysis, name: str) -> Json:
    found = analysis.shares[name]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{ARROWS[name]}, final",
        "showlegend": False,
        "x": [int(analysis.tokens_seen[-1])],
        "y": [round(found.share, 4)],
        "error_y": interval(found.share, found.low, found.high),
        "marker": {"color": f"var(--{name})", "symbol": CLASS_MARKS[name], "size": 12},
    }


def interval(share: float, low: float, high: float) -> Json:
    return {
        "type": "data",
        "symmetric": False,
        "array": [round(high - share, 5)],
        "arrayminus": [round(share - low, 5)],
    }


def losses(analysis: Analysis) -> Json:
    seen = analysis.tokens_seen
    traces = [
        line(ARROWS[name], seen, column, f"var(--{name})", CLASS_MARKS[name])
        for name, column in zip(CLASSES, analysis.class_losses.T, strict=True)
    ]
    dashed = {"color": "var(--ink)", "width": 2, "dash": "dash"}
    traces.append(line("all tokens", seen, analysis.mean_losses, "var(--ink)", line=dashed))
    return figure(traces, SEEN_AXIS, titled(NATS, rangemode="tozero"))


def kept_class(analysis: Analysis) -> Json:
    assert analysis.kept is not None
    traces = [
        line(ARROWS[name], analysis.tokens_seen, column, f"var(--{name})", CLASS_MARKS[name])
        for name, column in zip(CLASSES, analysis.kept.by_class.T, strict=True)
    ]
    return figure(traces, SEEN_AXIS, titled("share selected", **SHARE))


def kept_source(analysis: Analysis) -> Json:
    """The sources with the most tokens."""
    assert analysis.kept is not None
    counts = np.bincount(analysis.tokens.columns["source"], minlength=len(analysis.store.sources))
    largest = [int(index) for index in np.argsort(-counts)[:MAX_SOURCES] if counts[index]]
    traces = [
        line(
            analysis.store.sources[index],
            analysis.tokens_seen,
            analysis.kept.by_source[:, index],
            colour(place),
            MARKS[place % len(MARKS)],
        )
        for place, index in enumerate(largest)
    ]
    return figure(traces, SEEN_AXIS, titled("share selected", **SHARE))


def kept_loss(analysis: Analysis) -> Json:
    assert analysis.kept is not None
    seen = analysis.tokens_seen
    dashed = {"color": "var(--ink)", "width": 2, "dash": "dash"}
    traces = [
        line("selected", seen, analysis.kept.loss_selected, "var(--selected)", "circle"),
        line("unselected", seen, analysis.kept.loss_unselected, "var(--unselected)", "square"),
        line("all tokens", seen, analysis.mean_losses, "var(--ink)", line=dashed),
    ]
    return figure(traces, SEEN_AXIS, titled(NATS, rangemode="tozero"))


# ---- examples and distributions: panels of one run ----------------------------------------------


def trajectories(analysis: Analysis, name: str, chosen: np.ndarray, top: float) -> Json:
    """Losses of a few tokens of one class, each with its fitted line; `top`: of the axis, nats."""
    traces = []
    for number, target in enumerate(chosen):
        found = np.array([column[target] for column in analysis.losses])
        traces += trajectory(analysis, name, int(target), found, number)
    return figure(traces, SEEN_AXIS, titled(NATS, range=[0, top]), showlegend=False)


def trajectory(
    analysis: Analysis, name: str, target: int, found: np.ndarray, number: int
) -> list[Json]:
    shade, seen = f"var(--{name})", analysis.tokens_seen
    places = picks(len(seen), 20)  # straight in the checkpoints' numbers, not always in tokens
    fitted = np.linspace(
        analysis.trajectories.start[target], analysis.trajectories.end[target], len(seen)
    )
    look = {"hoverinfo": "none", "meta": number}  # the script shows the token
    dotted = {"color": shade, "width": 1.2, "dash": "dot"}
    return [
        line("", seen, found, shade, line={"color": shade, "width": 1.4}, **look),
        line("", seen[places], fitted[places], shade, line=dotted, **look),
    ]


def highest(analysis: Analysis, groups: Sequence[np.ndarray]) -> float:
    """The top of an axis for these tokens' losses."""
    chosen = np.concatenate(groups)
    return round(1.05 * max(float(column[chosen].max()) for column in analysis.losses), 2)


def excess_panels(analysis: Analysis) -> list[Json]:
    """Histograms at the first, a middle and the last checkpoint; nothing without scores."""
    if "reference_loss" not in analysis.tokens.columns:
        return []
    reference = analysis.tokens.columns["reference_loss"]
    chosen = picks(len(analysis.losses), 3).tolist()
    found = [analysis.losses[index] - reference for index in chosen]
    edges = bin_edges(found)
    return [
        excess_panel(analysis, excess, index, edges)
        for excess, index in zip(found, chosen, strict=True)
    ]


def bin_edges(columns: Sequence[np.ndarray]) -> np.ndarray:  # (BINS + 1,)
    """One range for all, without the outermost of 1,000."""
    low, high = np.quantile(np.concatenate(columns), [0.002, 0.998])
    return np.linspace(low, max(high, low + 1e-3), BINS + 1)


def excess_panel(analysis: Analysis, excess: np.ndarray, index: int, edges: np.ndarray) -> Json:
    seen = int(analysis.tokens_seen[index])
    groups = {"all tokens": np.ones(len(excess), bool)}
    if analysis.chooser is not None:
        selected = analysis.chooser.selected(analysis.losses[index], seen)
        groups = {"selected": selected, "unselected": ~selected}
    shades = {name: f"var(--{name})" for name in ("selected", "unselected")}
    shades["all tokens"] = "var(--c0)"
    traces = [
        bars(name, edges, histogram(excess[mask], edges) / len(excess), shades[name])
        for name, mask in groups.items()
    ]
    found = figure(
        traces,
        titled("excess loss (nats)", zeroline=True),
        titled("share of tokens", tickformat=".1~%", hoverformat=".2%"),
        barmode="stack",
        bargap=0,
    )
    return found | {"title": f"after {seen:,} tokens"}


def bars(name: str, edges: np.ndarray, share: np.ndarray, shade: str) -> Json:
    return {
        "type": "bar",
        "name": name,
        "x0": float((edges[0] + edges[1]) / 2),
        "dx": float(edges[1] - edges[0]),
        "y": numbers(share, 5),
        "marker": {"color": shade, "line": {"width": 0}},
    }


# ---- several runs -------------------------------------------------------------------------------


def compared(analyses: Sequence[Analysis]) -> Json:
    """Runs side by side."""
    return {
        "compared_losses": compared_losses(analyses),
        "compared_shares": compared_classes(analyses, share_bar, titled("share", **SHARE)),
        "compared_class_losses": compared_classes(analyses, loss_bar, titled(NATS)),
    }


def compared_losses(analyses: Sequence[Analysis]) -> Json:
    traces = [
        line(
            found.name,
            found.tokens_seen,
            found.mean_losses,
            colour(i),
            MARKS[i % len(MARKS)],
            line={"color": colour(i), "width": 2, "dash": dash(i)},
        )
        for i, found in enumerate(analyses)
    ]
    return figure(traces, SEEN_AXIS, NATS)


def compared_classes(analyses: Sequence[Analysis], bar: Any, y: Json) -> Json:
    traces = [
        bar(found)
        | {
            "type": "bar",
            "name": plain(found.name),
            "x": list(ARROWS.values()),
            "marker": {"color": colour(i), "pattern": {"shape": pattern(i)}},
        }
        for i, found in enumerate(analyses)
    ]
    return figure(traces, titled("", showgrid=False), y, barmode="group", bargap=0.25)


def pattern(index: int) -> str:
    """Beyond the seven colours bars are hatched."""
    return ("", "/", ".", "x", "-", "|", "+")[index // NUM_COLOURS % 7]


def dash(index: int) -> str:
    """And lines are dashed."""
    return ("solid", "dash", "dot", "dashdot")[index // NUM_COLOURS % 4]


def share_bar(analysis: Analysis) -> Json:
    found = [analysis.shares[name] for name in CLASSES]
    return {
        "y": [round(share.share, 4) for share in found],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [round(share.high - share.share, 5) for share in found],
            "arrayminus": [round(share.share - share.low, 5) for share in found],
            "thickness": 1,
            "color": "var(--ink)",
        },
    }


def loss_bar(analysis: Analysis) -> Json:
    return {"y": numbers(analysis.class_losses[-1], 4)}
