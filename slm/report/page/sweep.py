"""The page's figures of a sweep, from the panels of plots.py."""

from collections.abc import Iterable, Sequence

import numpy as np

from slm.report.page.figures import MARKS, SEEN_AXIS, colour, figure, line, plain, titled
from slm.report.page.tokens import numbers
from slm.report.paper.plots import LOSS_AXIS, RatioPanel, TokensPanel
from slm.store.files import Json
from slm.train.curves import Curve, by_label, mean_curve

DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")


def ratio_figure(panel: RatioPanel) -> Json:
    """Final loss against select_ratio: means with the range over seeds, the controls as lines."""
    traces = [
        trace
        for i, (label, points) in enumerate(panel.rules.items())
        for trace in ratio_line(label, sorted(points), colour(i), MARKS[i % len(MARKS)])
    ]
    ratios = sorted({ratio for points in panel.rules.values() for ratio, _ in points})
    ends = [ratios[0], ratios[-1]] if len(ratios) > 1 else [0.0, 1.0]
    traces += flat_lines(panel.flat, ends, [colour(i) for i in (4, 3, 2, 5)])
    traces += flat_lines(panel.lines, ends, ["var(--ink)", "var(--quiet)"])
    ticks = {"tickvals": ratios, "ticktext": [f"{ratio:g}" for ratio in ratios]}
    found = figure(traces, titled("select_ratio (k)", **ticks), f"final {LOSS_AXIS}")
    return found | {"title": panel.title}


def ratio_line(
    label: str, points: list[tuple[float, list[float]]], shade: str, mark: str
) -> list[Json]:
    """The line with a range at every point; one seed has none."""
    ratios = np.array([ratio for ratio, _ in points])
    means = np.array([np.mean(found) for _, found in points])
    up = numbers(np.array([max(found) for _, found in points]) - means, 5)
    down = numbers(means - np.array([min(found) for _, found in points]), 5)
    ranges = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2}
    trace = line(label, ratios, means, shade, mark)
    return [trace | {"error_y": ranges}] if any(up) or any(down) else [trace]


def flat_lines(lines: dict[str, float], ends: list[float], shades: Sequence[str]) -> list[Json]:
    return [
        line(
            name,
            np.array(ends),
            np.array([value, value]),
            shades[i % len(shades)],
            line={"color": shades[i % len(shades)], "width": 1.4, "dash": DASHES[i % len(DASHES)]},
        )
        for i, (name, value) in enumerate(lines.items())
    ]


def label_shades(panels: Iterable[TokensPanel]) -> dict[str, str]:
    """One colour a label in all panels."""
    labels = sorted({curve.label for panel in panels for curve in panel.curves})
    return {label: colour(index) for index, label in enumerate(labels)}


def tokens_figures(grid: Sequence[Sequence[TokensPanel]]) -> list[Json]:
    """The panels of a held-out set share their axis."""
    shades = label_shades(panel for row in grid for panel in row)
    return [tokens_figure(panel, shades, loss_range(row)) for row in grid for panel in row]


def loss_range(panels: Sequence[TokensPanel]) -> list[float]:
    """Without the steep first tenth of training, beside which the rest looks flat."""
    found = np.concatenate(
        [
            after(curve, max(start_of(panel), curve.tokens_seen[-1] / 10))[1]
            for panel in panels
            for curve in (*panel.curves, *panel.controls)
        ]
    )
    margin = 0.04 * float(np.ptp(found)) or 0.1
    return [round(float(found.min()) - margin, 4), round(float(found.max()) + margin, 4)]


def start_of(panel: TokensPanel) -> float:
    """The first measurement, before any training, is left out: it dwarfs the others."""
    return float(panel.curves[0].tokens_seen[:2].max())


def tokens_figure(panel: TokensPanel, shades: dict[str, str], bounds: list[float]) -> Json:
    """Loss during training: thin a seed, thick their mean."""
    start = start_of(panel)
    traces = [
        trace
        for label, runs in by_label(panel.curves).items()
        for trace in seed_lines(label, runs, start, shades[label], "solid")
    ]
    for label, runs in by_label(panel.controls).items():
        traces += seed_lines(label, runs, start, "var(--ink)", "dash")
    found = figure(traces, SEEN_AXIS, titled(LOSS_AXIS, range=bounds))
    return found | {"title": panel.title}


def seed_lines(
    label: str, runs: Sequence[Curve], start: float, shade: str, dash: str
) -> list[Json]:
    thin = {"showlegend": False, "hoverinfo": "skip", "opacity": 0.45, "legendgroup": plain(label)}
    traces = []
    if len(runs) > 1:
        style = {"color": shade, "width": 0.8, "dash": dash}
        traces = [line(label, *after(run, start), shade, line=style, **thin) for run in runs]
    style = {"color": shade, "width": 2, "dash": dash}
    group = {"legendgroup": plain(label)}
    return [*traces, line(label, *after(mean_curve(runs), start), shade, line=style, **group)]


def after(curve: Curve, start: float) -> tuple[np.ndarray, np.ndarray]:
    kept = curve.tokens_seen >= start
    return curve.tokens_seen[kept], curve.loss[kept]
