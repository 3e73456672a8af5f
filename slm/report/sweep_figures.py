"""Figures of arms: the final loss against select_ratio, and the loss during training.

To add one: a function of a `Sweep` that returns a `Figure`, and its line in SWEEP_FIGURES.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm.dynamics.colours import INK, PALETTE, QUIET, Colour, ramp
from slm.dynamics.figure import (
    DASHES,
    HELDOUT_LOSS,
    SEEN,
    Axis,
    Figure,
    Panel,
    Series,
    nth_series,
    seed_series,
)
from slm.dynamics.figures import Kind
from slm.errors import UserError
from slm.report.arms import Arm, Run
from slm.report.baselines import BEFORE
from slm.report.differences import Difference, difference
from slm.report.table import control_losses
from slm.selection.names import ALL_TOKENS
from slm.train.curves import Curve, by_label, mean_curve

MOST_TICKS = 12
MOST_LINES = 6  # with a panel each
MOST_ROWS = 40
MOST_MARKS = 8  # points of a curve that are each marked
MOST_CURVES = 40  # of runs in a panel that has each of them beside the means
MIN_LATE = 2  # points of a curve that show its course without its start
Points = list[tuple[float, list[float]]]  # (select_ratio, loss of each seed)


class Sweep(NamedTuple):
    arms: Sequence[Arm]
    baselines: Sequence[Arm]
    controls: Sequence[Run]  # on all tokens
    sets: Sequence[str]

    @property
    def control(self) -> dict[str, float]:
        """Mean final loss on all tokens, of each held-out set."""
        return control_losses(self.controls, self.sets)


# ---- against select_ratio -----------------------------------------------------------------------


def loss_vs_k(sweep: Sweep) -> Figure:
    if all(arm.takes_all_tokens and arm.select_ratio is None for arm in sweep.arms):
        raise UserError("no arm selects tokens")
    return ratio_figure([ratio_panel(name, *losses_of(name, sweep)) for name in sweep.sets])


def ratio_figure(panels: Sequence[Panel]) -> Figure:
    """A panel a set: means over seeds with their range, the controls as lines."""
    size = (4.4 + 1.6 / len(panels), 4.6)
    points = [one for panel in panels for one in panel.series if one.low is not None]
    has_seeds = any(np.any(one.low != one.high) for one in points)
    note = "points: mean over seeds, bands: lowest to highest" if has_seeds else ""
    return Figure("", panels, size=size, columns=len(panels), legend_title=note)


def losses_of(
    name: str, sweep: Sweep
) -> tuple[dict[str, Points], dict[str, float], dict[str, float]]:
    """Of the rules with a ratio, of those without, and of the controls and baselines."""
    lines: dict[str, Points] = defaultdict(list)
    flat = {}
    for arm in sweep.arms:
        if arm.select_ratio is not None:
            lines[arm.line].append((arm.select_ratio, arm.losses(name)))
        elif not arm.takes_all_tokens:
            flat[arm.label] = float(np.mean(arm.losses(name)))
    controls = {ALL_TOKENS: sweep.control[name]} if sweep.control else {}
    baselines = sorted(sweep.baselines, key=lambda arm: arm.label == BEFORE)  # not in every panel
    controls |= {arm.label: float(np.mean(arm.losses(name))) for arm in baselines}
    found = [*flat.values(), *(loss for label, loss in controls.items() if label != BEFORE)]
    found += [loss for points in lines.values() for _, seeds in points for loss in seeds]
    if BEFORE in controls and dwarfs(controls[BEFORE], found):
        del controls[BEFORE]
    return lines, flat, controls


def ratio_panel(
    title: str, lines: dict[str, Points], flat: dict[str, float], controls: dict[str, float]
) -> Panel:
    ratios = sorted({ratio for points in lines.values() for ratio, _ in points})
    ends = [ratios[0], ratios[-1]] if len(ratios) > 1 else [0.0, 1.0]
    series = [ratio_series(label, lines[label], i) for i, label in enumerate(lines)]
    series += flat_series(flat, ends, [PALETTE[i] for i in (4, 3, 2, 5)])
    series += flat_series(controls, ends, [INK, QUIET, PALETTE[3], PALETTE[2]])
    x = Axis(
        "select_ratio (k): share of tokens trained on",
        "select_ratio",
        ticks=ratios if len(ratios) <= MOST_TICKS else (),
    )
    return Panel(title, x, HELDOUT_LOSS._replace(title=f"final {HELDOUT_LOSS.title}"), series)


def ratio_series(label: str, points: Points, index: int) -> Series:
    points = sorted(points)
    low, high, mean = (np.array([of(losses) for _, losses in points]) for of in (min, max, np.mean))
    ratios = [ratio for ratio, _ in points]
    return nth_series(index, label, ratios, mean)._replace(low=low, high=high)


def flat_series(
    lines: dict[str, float], ends: Sequence[float], colours: Sequence[Colour]
) -> list[Series]:
    """Horizontal lines, told apart by their dashes."""
    return [
        Series(name, colours[i % len(colours)], ends, np.array([value] * 2))._replace(
            dash=DASHES[1 + i % (len(DASHES) - 1)], width=1.4
        )
        for i, (name, value) in enumerate(lines.items())
    ]


def dwarfs(start: float, others: Sequence[float]) -> bool:
    """Is the loss before training so far off that beside it the rest looks flat?"""
    return start > max(others) + float(np.ptp(others))


# ---- against all tokens -------------------------------------------------------------------------


def loss_differences(sweep: Sweep) -> Figure:
    """A panel a set, a row an arm, in the order of the first set."""
    others = [arm for arm in (*sweep.arms, *sweep.baselines) if not arm.is_control]
    if not sweep.controls or not others:
        raise UserError("no arm stands beside one on all tokens")
    found = [
        {arm.label: difference(arm, sweep.controls, name) for arm in others} for name in sweep.sets
    ]
    means = {label: one.mean for label, one in found[0].items()}
    notes = [""] * len(found)
    if BEFORE in means and dwarfs(means.pop(BEFORE), [0.0, *means.values()]):
        starts = [by_arm.pop(BEFORE).mean for by_arm in found]
        notes = [f"Before training, {start:+.3f}, is far off." for start in starts]
    labels = sorted(found[0], key=lambda label: found[0][label].mean)
    panels = [
        difference_panel(name, {label: by_arm[label] for label in labels[:MOST_ROWS]})
        for name, by_arm in zip(sweep.sets, found, strict=True)
    ]
    panels = [one._replace(note=note) for one, note in zip(panels, notes, strict=True)]
    is_cut = len(labels) > MOST_ROWS
    return Figure("", panels, f"The {MOST_ROWS} lowest of {len(labels)}." if is_cut else "")


def difference_panel(name: str, found: dict[str, Difference]) -> Panel:
    mean = np.array([one.mean for one in found.values()])
    half = np.array([one.half or 0.0 for one in found.values()])
    ends = {"low": mean - half, "high": mean + half}
    several = {label: one.seeds for label, one in found.items() if len(one.seeds) > 1}
    word = "mean over seeds" if several else "final loss"
    series = [Series(word, INK, list(found), mean, kind="points", **ends)]
    if several:
        words = [label for label, seeds in several.items() for _ in seeds]
        values = np.concatenate([*several.values()])
        series.append(Series("one seed", QUIET, words, values, kind="points", mark="x"))
    title = "loss minus all tokens' (nats per token)"
    y = Axis(title, "minus_all_tokens_nats", from_zero=True)
    return Panel(name, Axis("", "arm"), y, series)


# ---- during training ----------------------------------------------------------------------------


class Curves(NamedTuple):
    """Of one panel."""

    title: str
    set: str
    curves: Sequence[Curve]
    controls: Sequence[Curve]  # black and dashed

    @property
    def before(self) -> float | None:
        """Mean loss before training, None where it was not measured."""
        known = [curve.loss[0] for curve in self.curves if curve.tokens_seen[0] == 0]
        return float(np.mean(known)) if known else None


def loss_vs_tokens(sweep: Sweep) -> Figure:
    return tokens_figure([panel_curves(name, sweep.arms) for name in sweep.sets])


def tokens_figure(grid: Sequence[Sequence[Curves]]) -> Figure:
    """A panel a line and set, the arms that train on all tokens in each of them."""
    labels = sorted({curve.label for row in grid for found in row for curve in found.curves})
    colours = dict(zip(labels, ramp(len(labels)), strict=True))
    panels = [tokens_panel(found, colours, loss_range(row)) for row in grid for found in row]
    has_seeds = any(one.is_seed for panel in panels for one in panel.series)
    note = "thin lines: seeds, thick lines: their mean" if has_seeds else ""
    columns = min(4, len(grid[0]))
    return Figure("", panels, size=(4.0, 3.2), columns=columns, legend_title=note)


def panel_curves(name: str, arms: Sequence[Arm]) -> list[Curves]:
    """A panel a line of arms, or a panel a rule where the lines are many."""
    selecting = [arm for arm in arms if not arm.takes_all_tokens] or list(arms)
    controls = [arm for arm in arms if arm not in selecting]
    black = [run.curves[name]._replace(label=ALL_TOKENS) for arm in controls for run in arm.runs]
    is_many = len({arm.line for arm in selecting}) > MOST_LINES
    panels: dict[str, list[Curve]] = defaultdict(list)
    for arm in selecting:
        first = arm.runs[0]
        title, label = (first.line, arm.label) if is_many else (arm.line, first.name)
        short = label.removeprefix(f"{first.line} ")
        panels[title] += [run.curves[name]._replace(label=short) for run in arm.runs]
    return [Curves(f"{title}, {name}", name, curves, black) for title, curves in panels.items()]


def loss_range(row: Sequence[Curves]) -> tuple[float, float] | None:
    """Without the steep first tenth of training, beside which the rest looks flat.

    With the loss before training where that is near; None, all there is, where little was measured.
    """
    curves = [curve for found in row for curve in (*found.curves, *found.controls)]
    late = [curve.loss[curve.tokens_seen >= curve.tokens_seen[-1] / 10] for curve in curves]
    if min(map(len, late)) < MIN_LATE:
        return None
    losses = np.concatenate(late)
    near = float(losses.max() + np.ptp(losses) / 2)
    before = [found.before for found in row if found.before is not None and found.before <= near]
    shown = np.array([*losses, *before])
    margin = 0.04 * float(np.ptp(shown)) or 0.1
    return float(shown.min()) - margin, float(shown.max()) + margin


def tokens_panel(
    found: Curves, colours: dict[str, Colour], bounds: tuple[float, float] | None
) -> Panel:
    is_full = len(found.curves) > MOST_CURVES
    width = 1.2 if is_full else 2.0
    series = [
        one
        for label, runs in by_label(found.curves).items()
        for one in seed_series(
            runs, marked(look(label, colours[label]), runs)._replace(width=width)
        )
        if not (one.is_seed and is_full)
    ]
    for label, runs in by_label(found.controls).items():
        series += seed_series(runs, marked(look(label, INK), runs)._replace(dash="dash"))
    note = ""
    if found.before is not None:
        ends = [0.0, max(float(curve.tokens_seen[-1]) for curve in found.curves)]
        line = Series("before training", QUIET, ends, np.array([found.before] * 2))
        series.append(line._replace(dash="dot", width=1.4))
        note = f"Before training: {found.before:.3f}."
    y = HELDOUT_LOSS._replace(bounds=bounds)
    return Panel(found.title, SEEN, y, series, group=found.set, note=note)


def look(label: str, colour: Colour) -> Series:
    return Series(label, colour, [], np.array([]))


def marked(line: Series, runs: Sequence[Curve]) -> Series:
    """Where few points were measured, they are shown: between them is a guess."""
    return line._replace(mark="circle") if len(runs[0].loss) <= MOST_MARKS else line


def loss_curves(
    curves: Sequence[Curve], lines: dict[str, float], title: str, start: float = 0.0
) -> Figure:
    """Loss against tokens: one colour a label, its last loss in the legend.

    lines:  horizontal lines, e.g. the reference model's own loss
    start:  leave out what lies before so many tokens (the first points dwarf the rest)
    """
    series = []
    for index, (label, runs) in enumerate(by_label(curves).items()):
        text = f"{label} ({mean_curve(runs).loss[-1]:.3f})"
        shown = [later(run, start) for run in runs]
        colour = PALETTE[index % len(PALETTE)]
        series += seed_series(shown, look(label, colour)._replace(label=text))
    ends = [start, max(float(curve.tokens_seen[-1]) for curve in curves)]
    named = {f"{name} ({value:.3f})": value for name, value in lines.items()}
    series += flat_series(named, ends, [QUIET])
    return Figure("", [Panel(title, SEEN, HELDOUT_LOSS, series)], size=(7.2, 4.4))


def later(curve: Curve, start: float) -> Curve:
    late = curve.tokens_seen >= start
    return Curve(curve.label, curve.tokens_seen[late], curve.loss[late])


SWEEP_FIGURES = (
    Kind(loss_differences, "differences", paper=False),
    Kind(loss_vs_k, "ratios"),
    Kind(loss_vs_tokens, "tokens"),
)
