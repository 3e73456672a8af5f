"""Figures for papers, after those of Rho-1, from the stored losses of runs.

    text_figure         figure 2   a piece of text, the selected tokens (or the classes) coloured
    class_figure        figure 3   the mean loss of each class, and tokens that go up and down
    selection_figure    figure 6   loss of what a rule selects and does not, beside a control
    perplexity_figure   figure 8   perplexity of the sets selected at several checkpoints

Each writes PNG, SVG and, so that others can draw it anew, the numbers it draws as CSV. Only an
`Analysis` is read: no model, corpus or tokenizer. The same losses give the same bytes.
"""

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.analysis import Analysis, mean_or_nan
from slm.dynamics.classes import ARROWS, CLASSES
from slm.errors import UserError
from slm.report.paper.excerpts import FONT, legend_text
from slm.report.paper.parts import (
    CLASS_COLOURS,
    LOSS_AXIS,
    WIDTH,
    Line,
    amounts,
    chooser_of,
    draw_panel,
    finish,
    line_rows,
)
from slm.report.paper.plots import COLOURS, LEGEND_SIZE, dress, pyplot, shared_legend
from slm.report.paper.text import text_figure
from slm.selection.registry import takes_all_tokens
from slm.train.curves import Curve

log = logging.getLogger(__name__)

RUN_COLOUR, CONTROL_COLOUR = COLOURS[1], COLOURS[0]
MIN_COMMON = 2  # checkpoints that make a line
MOST_CHARACTERS = 150  # of a run's name in a file's
MOST_POINTS = 48  # of a single token's loss: more are a block of colour

# ---- classes ------------------------------------------------------------------------------------

CLASS_PANELS = {"classes": "class means", "LL": "tokens of L→L", "HH": "tokens of H→H"}


def class_figure(analysis: Analysis, path: Path, num_tokens: int = 3, seed: int = 0) -> None:
    """The mean loss of each class, and some tokens of L→L and H→H whose loss goes up and down.

    The tokens are drawn by seed from the twentieth of their class with the highest variance around
    their lines.
    """
    lines = class_lines(analysis)
    for name in ("LL", "HH"):
        lines += token_lines(analysis, name, fluctuating(analysis, name, num_tokens, seed))
    figure, places = pyplot().subplots(1, 3, figsize=(WIDTH, 3.4), layout="constrained")
    for letter, axes, (panel, title) in zip("abc", places, CLASS_PANELS.items(), strict=True):
        mine = [line for line in lines if line.panel == panel]
        if not mine:
            axes.axis("off")
            dress(axes, f"({letter}) no {title}", width=1.9)
            continue
        draw_panel(axes, mine, f"({letter}) {title}", width=1.9)
        panel_legend(axes, family=None if panel == "classes" else FONT)
    places[0].set_ylabel(LOSS_AXIS)
    finish(figure, path, line_rows(lines, "loss_nats"))


def class_lines(analysis: Analysis) -> list[Line]:
    """Of the classes that have tokens."""
    found = []
    for index, name in enumerate(CLASSES):
        share, values = analysis.shares[name], analysis.class_losses[:, index]
        label = f"{ARROWS[name]} ({share_text(share.share)} of tokens)"
        if share.num_tokens:
            colour = CLASS_COLOURS[name]
            found.append(Line("classes", name, label, colour, analysis.tokens_seen, values))
    return found


def share_text(share: float) -> str:
    """A class that has tokens never has 0% of them."""
    return "under 1%" if share < 0.01 else f"{100 * share:.0f}%"


def fluctuating(analysis: Analysis, name: str, count: int, seed: int) -> np.ndarray:
    """Indices of targets."""
    mine = np.flatnonzero(analysis.trajectories.label == CLASSES.index(name))
    order = mine[np.argsort(-analysis.trajectories.variance[mine], kind="stable")]
    pool = order[: max(count, len(mine) // 20)]
    return np.sort(np.random.default_rng(seed).permutation(pool)[:count])


def token_lines(analysis: Analysis, panel: str, targets: np.ndarray) -> list[Line]:
    """At checkpoints spread evenly over all."""
    last = len(analysis.losses) - 1
    places = np.unique(np.linspace(0, last, min(last + 1, MOST_POINTS)).round().astype(np.int64))
    seen, pieces = analysis.tokens_seen[places], analysis.tokens.pieces
    found = []
    for target, colour in zip(targets, cycle(COLOURS)):  # noqa: B905  # colours have no end
        text = pieces[int(analysis.tokens.targets[target])].decode(errors="replace")
        values = np.array([analysis.losses[index][target] for index in places], np.float64)
        found.append(Line(panel, text, legend_text(text), colour, seen, values, int(target)))
    return found


def panel_legend(axes: Any, family: str | None) -> None:
    """Below the panel, where it hides no line."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.24),
        frameon=False,
        prop={"size": LEGEND_SIZE - 1} | ({"family": family} if family else {}),
    )


# ---- selection ----------------------------------------------------------------------------------


def selection_figure(
    run: Analysis,
    control: Analysis | None,
    path: Path,
    heldout: Sequence[Curve] = (),  # labelled with the names of the two
    heldout_name: str = "held-out text",
) -> None:
    """Loss of the tokens that the run's rule selects, and of the others, in both runs.

    At each checkpoint the rule is asked about the run's losses of that checkpoint, and the control
    is measured on the same tokens: a set chosen for the run's high losses, which is not fair to the
    run. The held-out text is what both can be compared by.
    """
    lines = selection_lines(run, control, heldout)
    titles = {"selected": "selected", "heldout": heldout_name, "unselected": "unselected"}
    panels = [panel for panel in titles if any(line.panel == panel for line in lines)]
    size = (WIDTH, 2.6)
    figure, places = pyplot().subplots(1, len(panels), figsize=size, layout="constrained")
    for letter, axes, panel in zip("abc", np.atleast_1d(places), panels, strict=False):
        mine = [line for line in lines if line.panel == panel]
        draw_panel(axes, mine, f"({letter}) {titles[panel]}", WIDTH / len(panels) - 0.4)
    figure.axes[0].set_ylabel(LOSS_AXIS)
    shared_legend(figure, figure.axes, None)
    finish(figure, path, line_rows(lines, "loss_nats"))


def selection_lines(
    run: Analysis, control: Analysis | None, heldout: Sequence[Curve]
) -> list[Line]:
    chooser_of(run)
    assert run.kept is not None, "a chooser comes with what it keeps"
    values = {"selected": run.kept.loss_selected, "unselected": run.kept.loss_unselected}
    colours, seen = {run.name: RUN_COLOUR}, run.tokens_seen
    lines = [Line(k, run.name, run.name, RUN_COLOUR, seen, v) for k, v in values.items()]
    if control is not None:
        colours[control.name] = CONTROL_COLOUR
        lines += control_lines(run, control)
    return lines + [heldout_line(curve, colours) for curve in heldout if len(curve.loss)]


def control_lines(run: Analysis, control: Analysis) -> list[Line]:
    """The run's choices at the checkpoints that both have, on the control's losses."""
    seen, mine, others = common_checkpoints(run, control)
    selected, unselected = [], []
    for at, index, other in zip(seen, mine, others, strict=True):
        mask = chooser_of(run).selected(run.losses[index], int(at))
        selected.append(mean_or_nan(control.losses[other][mask]))
        unselected.append(mean_or_nan(control.losses[other][~mask]))
    name = control.name
    return [
        Line(panel, name, name, CONTROL_COLOUR, seen, np.array(values))
        for panel, values in (("selected", selected), ("unselected", unselected))
    ]


def common_checkpoints(run: Analysis, control: Analysis) -> tuple[np.ndarray, ...]:
    """The tokens seen that both have, and their indices in each; refused for other tokens."""
    folders = f"{run.store.folder} and {control.store.folder}"
    if run.name == control.name:
        raise UserError(f"{folders}: both runs are named {run.name}")
    for field in ("corpus_fingerprint", "windows_sha256"):
        mine, other = run.store.plan[field], control.store.plan[field]
        if mine != other:
            raise UserError(f"{folders} are about other tokens: {field} is {mine} and {other}")
    found = np.intersect1d(run.tokens_seen, control.tokens_seen, return_indices=True)
    if len(found[0]) < MIN_COMMON:
        raise UserError(
            f"{folders} have {len(found[0])} checkpoints at the same tokens_seen, {MIN_COMMON} are "
            f"needed: {brief(run.tokens_seen)} and {brief(control.tokens_seen)}"
        )
    return found


def brief(numbers: np.ndarray, most: int = 4) -> str:
    shown = ", ".join(f"{number:,}" for number in numbers[:most])
    return f"[{shown}, ...]" if len(numbers) > most else f"[{shown}]"


def heldout_line(curve: Curve, colours: dict[str, str]) -> Line:
    name = curve.label
    if name not in colours:
        raise UserError(f"the held-out curve {name!r} is of neither run: {', '.join(colours)}")
    return Line("heldout", name, name, colours[name], curve.tokens_seen, curve.loss)


# ---- perplexity ---------------------------------------------------------------------------------


def perplexity_figure(analysis: Analysis, path: Path, num: int = 5) -> None:
    """Perplexity over training of the sets selected at `num` checkpoints, each marked on its line.

    A set chosen for its high losses falls afterwards, and was lower before, by chance alone.
    """
    lines = perplexity_lines(analysis, spread_checkpoints(analysis, num))
    figure, axes = pyplot().subplots(figsize=(4.4, 3.2), layout="constrained")
    draw_panel(axes, lines, analysis.name, width=3.7)
    axes.set_ylabel("perplexity")
    shared_legend(figure, [axes], "tokens selected after (the point on the line)", most=3)
    finish(figure, path, line_rows(lines, "perplexity"))


def spread_checkpoints(analysis: Analysis, num: int) -> np.ndarray:
    """Indices, evenly spread up to the last, of those at which the rule selects."""
    start = chooser_of(analysis).start
    able = np.flatnonzero(analysis.tokens_seen >= start)
    if len(able) == 0:
        last = analysis.tokens_seen[-1]
        raise UserError(
            f"{analysis.store.folder}: the rule starts after {start:,} tokens, the last checkpoint "
            f"has seen {last:,}"
        )
    return able[np.unique(np.linspace(0, len(able) - 1, num + 1)[1:].round().astype(np.int64))]


def perplexity_lines(analysis: Analysis, checkpoints: np.ndarray) -> list[Line]:
    seen = analysis.tokens_seen
    lines, labels = [], amounts(seen[checkpoints].tolist())
    for index, label, colour in zip(checkpoints, labels, cycle(COLOURS[:6])):  # noqa: B905
        mask = chooser_of(analysis).selected(analysis.losses[index], int(seen[index]))
        values = np.exp([mean_or_nan(column[mask]) for column in analysis.losses])
        series = f"{seen[index]}"
        lines.append(Line("selected", series, label, colour, seen, values, mark=int(index)))
    return lines


# ---- all of them --------------------------------------------------------------------------------

Draw = Callable[[Path], None]


def paper_figures(
    analyses: Sequence[Analysis],
    out: Path,
    heldout: Sequence[Curve] = (),  # labelled with the names of the runs
    heldout_name: str = "held-out text",
    seed: int = 0,
) -> list[Path]:
    """Write the figures that can be drawn of the runs; the log says why others cannot.

    The control is a run of the same tokens that trains on all of them, of the same seed where
    there is one. Returns the PNGs; SVG and CSV stand beside them under the same name.
    """
    written = []
    for analysis, stem in zip(analyses, file_names(analyses), strict=True):
        figures = {
            "classes": partial(class_figure, analysis, seed=seed),
            "text-classes": partial(text_figure, analysis, by="class", seed=seed),
        }
        if selects(analysis):
            figures |= selecting_figures(analysis, analyses, heldout, heldout_name, seed)
        paths = {out / f"{kind}-{stem}.png": draw for kind, draw in figures.items()}
        written += [path for path, draw in paths.items() if is_drawn(draw, path)]
    return written


def selecting_figures(
    run: Analysis,
    analyses: Sequence[Analysis],
    heldout: Sequence[Curve],
    heldout_name: str,
    seed: int,
) -> dict[str, Draw]:
    control = control_of(run, analyses)
    names = [one.name for one in (run, control) if one is not None]
    curves = [curve for curve in heldout if curve.label in names]
    return {
        "text-selected": partial(text_figure, run, seed=seed),
        "selection": lambda path: selection_figure(run, control, path, curves, heldout_name),
        "perplexity": partial(perplexity_figure, run),
    }


def is_drawn(draw: Draw, path: Path) -> bool:
    try:
        draw(path)
    except UserError as error:
        log.info("%s is not drawn: %s", path.name, error)
        return False
    return True


def selects(analysis: Analysis) -> bool:
    """Does its rule pick tokens, and is it known which? The log says why not."""
    try:
        chooser = chooser_of(analysis)
    except UserError as error:
        log.info("%s: no figures of what is selected: %s", analysis.name, error)
        return False
    everything = takes_all_tokens(analysis.store.plan["run"]["selection"])
    if everything or not chooser.rule.picks_tokens:
        log.info("%s: figures of what is selected do not apply to %s", analysis.name, chooser.name)
        return False
    return True


def seed_of(analysis: Analysis) -> int:
    """Of the order of its samples."""
    return analysis.store.plan["run"]["seed"]


def control_of(run: Analysis, analyses: Sequence[Analysis]) -> Analysis | None:
    for other in sorted(analyses, key=lambda other: seed_of(other) != seed_of(run)):
        if takes_all_tokens(other.store.plan["run"]["selection"]):
            try:
                common_checkpoints(run, other)
            except UserError as error:
                log.info("%s is no control of %s: %s", other.name, run.name, error)
            else:
                return other
    log.info("%s: no run on all tokens stands beside it", run.name)
    return None


def file_names(analyses: Sequence[Analysis]) -> list[str]:
    """The runs' names with what is safe in a file's, cut, each once."""
    found: list[str] = []
    for analysis in analyses:
        stem = (
            re.sub(r"[^A-Za-z0-9.=-]+", "_", analysis.name).strip("._")[:MOST_CHARACTERS] or "run"
        )
        taken = sum(name == stem or name.startswith(f"{stem}~") for name in found)
        found.append(f"{stem}~{taken + 1}" if taken else stem)
    return found
