"""Figures of what a run's rule selects: shares, losses, perplexity, excess loss, signal and noise.

Selected is what the rule selects when it is asked about the frozen tokens at each checkpoint. Where
it cannot be asked, or its choice says nothing of a token, a UserError says why.
"""

import logging
from collections.abc import Sequence
from itertools import cycle

import numpy as np

from slm.dynamics.analysis import Analysis, Chooser, Kept, histogram, mean_or_nan
from slm.dynamics.class_figures import LOSS_FROM_0, Shown, all_tokens, class_series
from slm.dynamics.colours import BLUE, ORANGE, PALETTE, SELECTED, UNSELECTED, Colour
from slm.dynamics.figure import (
    LOSS,
    SEEN,
    Axis,
    Figure,
    Panel,
    Series,
    amounts,
    nth_series,
    one_panel,
    picks,
    share,
)
from slm.errors import UserError
from slm.selection.names import selection_name
from slm.selection.registry import takes_all_tokens
from slm.store.columns import COLUMNS

log = logging.getLogger(__name__)

RUN_COLOUR, CONTROL_COLOUR = ORANGE, BLUE
MAX_SOURCES = 10  # lines of sources: the largest
BINS = 60
MIN_COMMON = 2  # checkpoints that make a line
SCORES = {  # in the order of the legend
    "excess_loss": "high excess loss",
    "token_loss": "high loss",
    **{c.frozen_name: f"low {c.frozen_name.replace('_', ' ')}" for c in COLUMNS.values()},
    "random": "random",
}
SHARE_SELECTED = share("share selected")


def chooser_of(analysis: Analysis) -> Chooser:
    if analysis.chooser is None:
        rule = selection_name(analysis.store.plan["run"]["selection"])
        raise UserError(f"{analysis.store.folder} has no reference scores, {rule} needs them")
    return analysis.chooser


def kept_of(analysis: Analysis) -> Kept:
    chooser_of(analysis)
    assert analysis.kept is not None, "a chooser comes with what it keeps"
    return analysis.kept


def picker_of(analysis: Analysis) -> Chooser:
    """Of a rule that picks tokens for what they are."""
    chooser, selection = chooser_of(analysis), analysis.store.plan["run"]["selection"]
    if takes_all_tokens(selection) or not chooser.rule.picks_tokens:
        what = "figures of what is selected do not apply to"
        raise UserError(f"{analysis.name}: {what} {chooser.name}")
    return chooser


# ---- shares and losses --------------------------------------------------------------------------


def kept_frac_by_class(shown: Shown) -> Figure:
    series = class_series(shown.analysis, kept_of(shown.analysis).by_class)
    return one_panel(
        "Share selected, by class",
        SHARE_SELECTED,
        series,
        "The run’s own rule, asked about the frozen tokens at each checkpoint.",
    )


def kept_frac_by_source(shown: Shown) -> Figure:
    kept, names = kept_of(shown.analysis), shown.analysis.store.sources
    counts = np.bincount(shown.analysis.tokens.columns["source"], minlength=len(names))
    largest = [int(index) for index in np.argsort(-counts)[:MAX_SOURCES] if counts[index]]
    seen = shown.analysis.tokens_seen
    series = [nth_series(n, names[i], seen, kept.by_source[:, i]) for n, i in enumerate(largest)]
    return one_panel(
        "Share selected, by source",
        SHARE_SELECTED,
        series,
        "The sources with the most tokens, ten at most.",
    )


def loss_by_selection(shown: Shown) -> Figure:
    kept, seen = kept_of(shown.analysis), shown.analysis.tokens_seen
    series = [Series("selected", SELECTED, seen, kept.loss_selected, mark="circle")]
    if not np.isnan(kept.loss_unselected).all():  # a rule may take everything
        series.append(Series("unselected", UNSELECTED, seen, kept.loss_unselected, mark="square"))
    series.append(all_tokens(shown.analysis))
    return one_panel(
        "Loss of selected and unselected tokens",
        LOSS_FROM_0,
        series,
        "Selected anew at each checkpoint: a rule that ranks by loss selects high ones by "
        "definition.",
    )


# ---- excess loss --------------------------------------------------------------------------------


def excess_loss(shown: Shown) -> Figure:
    """Histograms at the first, a middle and the last checkpoint."""
    analysis = shown.analysis
    if "reference_loss" not in analysis.tokens.columns:
        raise UserError(f"{analysis.store.folder} has no reference losses")
    chosen = picks(len(analysis.losses), 3).tolist()
    found = [analysis.losses[i] - analysis.tokens.columns["reference_loss"] for i in chosen]
    edges = bin_edges(found)
    x, y = Axis("excess loss (nats)", "excess_loss_nats"), share("share of tokens")
    panels = []
    for index, excess in zip(chosen, found, strict=True):
        title = f"after {analysis.tokens_seen[index]:,} tokens"
        series = excess_series(analysis, index, excess, edges)
        panels.append(Panel(title, x, y, series, stacked=True))
    return Figure("", panels)


def bin_edges(columns: Sequence[np.ndarray]) -> np.ndarray:  # (BINS + 1,)
    """One range for all, without the outermost of 1,000."""
    low, high = np.quantile(np.concatenate(columns), [0.002, 0.998])
    return np.linspace(low, max(high, low + 1e-3), BINS + 1)


def excess_series(
    analysis: Analysis, index: int, excess: np.ndarray, edges: np.ndarray
) -> list[Series]:
    groups, colours = {"all tokens": np.ones(len(excess), bool)}, [BLUE]
    if analysis.chooser is not None:
        chosen = analysis.chooser.selected(analysis.losses[index], int(analysis.tokens_seen[index]))
        groups, colours = {"selected": chosen, "unselected": ~chosen}, [SELECTED, UNSELECTED]
    middles = (edges[1:] + edges[:-1]) / 2
    return [
        Series(name, colour, middles, histogram(excess[mask], edges) / len(excess), kind="bars")
        for (name, mask), colour in zip(groups.items(), colours, strict=True)
        if mask.any()
    ]


# ---- beside a control ---------------------------------------------------------------------------


def selection(shown: Shown) -> Figure:
    """Rho-1, figure 6: loss of what the rule selects and does not, in the run and in its control.

    The control, a run on all tokens, is measured on the run's choices: a set chosen for the run's
    high losses, which is not fair to the run. The held-out text is what both can be compared by.
    """
    run, chooser = shown.analysis, picker_of(shown.analysis)
    control = control_of(run, shown.others)
    both = {run.name: RUN_COLOUR} | ({} if control is None else {control.name: CONTROL_COLOUR})
    kept = kept_of(run)
    found = {"selected": kept.loss_selected, "unselected": kept.loss_unselected}
    lines = {name: [run_series(run, run.tokens_seen, y)] for name, y in found.items()}
    if control is not None:
        seen, values = control_losses(run, control, chooser)
        for name, y in values.items():
            lines[name].append(run_series(control, seen, y, CONTROL_COLOUR))
    heldout = [
        Series(curve.label, both[curve.label], curve.tokens_seen, curve.loss)
        for curve in shown.heldout
        if curve.label in both and len(curve.loss)
    ]
    panels = [Panel("selected", SEEN, LOSS, lines["selected"])]
    if heldout:
        panels.append(Panel(shown.heldout_name, SEEN, LOSS, heldout, "heldout"))
    panels.append(Panel("unselected", SEEN, LOSS, lines["unselected"]))
    return Figure("", panels, size=(6.8 / len(panels), 2.6), lettered=True)


def run_series(run: Analysis, x: np.ndarray, y: np.ndarray, colour: Colour = RUN_COLOUR) -> Series:
    return Series(run.name, colour, x, y)


def control_losses(
    run: Analysis, control: Analysis, chooser: Chooser
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tokens seen that both have, and the control's losses there on the run's choices."""
    seen, mine, others = common_checkpoints(run, control)
    masks = [chooser.selected(run.losses[i], int(at)) for at, i in zip(seen, mine, strict=True)]
    found = [(control.losses[i], mask) for i, mask in zip(others, masks, strict=True)]
    return seen, {
        "selected": np.array([mean_or_nan(losses[mask]) for losses, mask in found]),
        "unselected": np.array([mean_or_nan(losses[~mask]) for losses, mask in found]),
    }


def control_of(run: Analysis, others: Sequence[Analysis]) -> Analysis | None:
    """A run of the same tokens that trains on all, of the same seed where there is one."""
    for other in sorted(others, key=lambda other: seed_of(other) != seed_of(run)):
        if takes_all_tokens(other.store.plan["run"]["selection"]):
            try:
                common_checkpoints(run, other)
            except UserError as error:
                log.info("%s is no control of %s: %s", other.name, run.name, error)
            else:
                return other
    log.info("%s: no run on all tokens stands beside it", run.name)
    return None


def seed_of(analysis: Analysis) -> int:
    """Of the order of its samples."""
    return analysis.store.plan["run"]["seed"]


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


# ---- perplexity ---------------------------------------------------------------------------------


def perplexity(shown: Shown, num: int = 5) -> Figure:
    """Rho-1, figure 8: perplexity over training of the sets selected at `num` checkpoints.

    A set chosen for its high losses falls afterwards, and was lower before, by chance alone.
    """
    analysis, chooser = shown.analysis, picker_of(shown.analysis)
    seen, series, checkpoints = analysis.tokens_seen, [], spread_checkpoints(analysis, num)
    labels = amounts(seen[checkpoints].tolist())
    for at, label, colour in zip(checkpoints.tolist(), labels, cycle(PALETTE)):  # noqa: B905
        mask = chooser.selected(analysis.losses[at], int(seen[at]))
        values = np.exp([mean_or_nan(column[mask]) for column in analysis.losses])
        series.append(Series(f"{seen[at]}", colour, seen, values, label, at=at))
    panel = Panel(analysis.name, SEEN, Axis("perplexity", "perplexity"), series, "selected")
    return Figure("", [panel], legend_title="tokens selected after (the point on the line)")


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


# ---- signal and noise ---------------------------------------------------------------------------


def auc_of_scores(shown: Shown) -> Figure:
    """AUC over training, of all labelled tokens: a line a score."""
    if not shown.truth:
        raise UserError(f"{shown.analysis.store.folder} has no labels of signal and noise")
    series = []
    for index, (name, label) in enumerate(SCORES.items()):
        mine = [row for row in shown.truth if row["score"] == name and row["part"] == "all"]
        seen, values = (np.array([row[key] for row in mine]) for key in ("tokens_seen", "auc"))
        if mine:
            series.append(nth_series(index, name, seen, values, label))
    return one_panel(
        "AUC over training",
        Axis("AUC", "auc", bounds=(0.0, 1.0)),
        series,
        "All labelled tokens; scores of the reference model do not move.",
    )


def kept_frac_by_signal(shown: Shown) -> Figure:
    """What the run's rule keeps of signal and of noise."""
    if not shown.truth:
        raise UserError(f"{shown.analysis.store.folder} has no labels of signal and noise")
    seen, (noise, signal) = shown.analysis.tokens_seen, kept_of(shown.analysis).by_signal.T
    series = [nth_series(0, "signal", seen, signal), nth_series(1, "noise", seen, noise)]
    return one_panel(
        "Share selected of signal and of noise",
        SHARE_SELECTED,
        series,
        "The run’s own rule, asked about all frozen tokens.",
    )
