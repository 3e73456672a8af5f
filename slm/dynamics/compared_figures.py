"""Figures of several runs: a line or a row an arm, pooled over its seeds.

Rows show a mean over seeds and reach from the lowest to the highest seed. What an arm does not know
(its rule's scores, labels) is absent.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis
from slm.dynamics.class_figures import CLASS_MARKS
from slm.dynamics.classes import ARROWS, CLASSES
from slm.dynamics.colours import BLUE, CLASS_COLOURS, ORANGE, PALETTE, Colour
from slm.dynamics.figure import (
    LOSS,
    MARKS,
    Axis,
    Figure,
    Row,
    Series,
    nth_series,
    one_panel,
    seed_series,
    share,
)
from slm.dynamics.selection_figures import MAX_SOURCES, SCORES, SHARE_SELECTED
from slm.errors import UserError
from slm.train.curves import Curve

ARM_AXIS = Axis("", "arm")


class Compared(NamedTuple):
    """Runs beside each other."""

    analyses: Sequence[Analysis]
    truth: Sequence[Row] = ()  # truth.truth_rows of all of them

    @property
    def arms(self) -> dict[str, list[Analysis]]:
        """In the order of the runs."""
        return {
            arm: [run for run in self.analyses if run.arm == arm]
            for arm in dict.fromkeys(run.arm for run in self.analyses)
        }


class Group(NamedTuple):
    """What each arm has a point of: a class, a source, a score."""

    name: str
    label: str
    colour: Colour
    mark: str


CLASS_GROUPS = [Group(c, ARROWS[c], CLASS_COLOURS[c], CLASS_MARKS[c]) for c in CLASSES]


def groups_of(names: Sequence[str], labels: Sequence[str] = ()) -> list[Group]:
    """As many as there are marks, at least."""
    texts = labels or names
    looks = [(PALETTE[i % len(PALETTE)], MARKS[i % len(MARKS)]) for i in range(len(names))]
    return [Group(name, text, *look) for name, text, look in zip(names, texts, looks, strict=True)]


# ---- a row an arm -------------------------------------------------------------------------------


def rows(
    compared: Compared, groups: Sequence[Group], values: Callable[[Analysis], np.ndarray]
) -> list[Series]:
    """values:  of a run (G,), NaN where nothing is known"""
    pooled = {arm: np.array([values(run) for run in runs]) for arm, runs in compared.arms.items()}
    low, mean, high = (
        np.array([of(found, axis=0) for found in pooled.values()])
        for of in (np.min, np.mean, np.max)
    )
    return [
        Series(group.name, group.colour, list(pooled), mean[:, i], group.label)._replace(
            kind="points", mark=group.mark, low=low[:, i], high=high[:, i]
        )
        for i, group in enumerate(groups)
        if not np.isnan(mean[:, i]).all()
    ]


def row_figure(heading: str, y: Axis, series: list[Series], caption: str) -> Figure:
    if not series:
        raise UserError("no run has what it shows")
    return one_panel(heading, y, series, caption, ARM_AXIS)


# ---- losses and classes -------------------------------------------------------------------------


def compared_losses(compared: Compared) -> Figure:
    series = []
    for index, (arm, runs) in enumerate(compared.arms.items()):
        curves = [Curve(arm, run.tokens_seen, run.mean_losses) for run in runs]
        series += seed_series(curves, nth_series(index, arm, [], np.array([])))
    return one_panel(
        "Mean loss of the frozen tokens",
        LOSS,
        series,
        "All tokens of the set, selected or not. Thin lines: seeds, thick lines: their mean.",
    )


def compared_shares(compared: Compared) -> Figure:
    series = rows(
        compared, CLASS_GROUPS, lambda run: np.array([run.shares[name].share for name in CLASSES])
    )
    return row_figure("Shares of the classes", share("share"), series, "At the end of training.")


def compared_class_losses(compared: Compared) -> Figure:
    return row_figure(
        "Loss of each class at the end",
        LOSS,
        rows(compared, CLASS_GROUPS, lambda run: run.class_losses[-1]),
        "Each run has its own classes: the same token can be in different ones.",
    )


# ---- what is selected ---------------------------------------------------------------------------


def compared_kept_by_class(compared: Compared) -> Figure:
    nothing = np.full(len(CLASSES), np.nan)
    return row_figure(
        "Share selected at the end, by class",
        SHARE_SELECTED,
        rows(compared, CLASS_GROUPS, lambda run: run.kept.by_class[-1] if run.kept else nothing),
        "Each run’s own rule, asked about the frozen tokens at its last checkpoint.",
    )


def compared_kept_by_source(compared: Compared) -> Figure:
    """The largest sources of the first run; a run of other tokens has those that it shares."""
    first = compared.analyses[0]
    names = first.store.sources
    counts = np.bincount(first.tokens.columns["source"], minlength=len(names))
    largest = [names[int(i)] for i in np.argsort(-counts, kind="stable")[:MAX_SOURCES] if counts[i]]

    def values(run: Analysis) -> np.ndarray:
        last = run.kept.by_source[-1].tolist() if run.kept else [np.nan] * len(run.store.sources)
        known = dict(zip(run.store.sources, last, strict=True))
        return np.array([known[name] if name in known else np.nan for name in largest])

    return row_figure(
        "Share selected at the end, by source",
        SHARE_SELECTED,
        rows(compared, groups_of(largest), values),
        "The sources with the most tokens, ten at most.",
    )


def compared_kept_by_signal(compared: Compared) -> Figure:
    groups = [Group("signal", "signal", BLUE, "circle"), Group("noise", "noise", ORANGE, "square")]
    nothing = np.full(2, np.nan)
    return row_figure(
        "Share selected at the end, of signal and of noise",
        SHARE_SELECTED,
        rows(compared, groups, lambda run: run.kept.by_signal[-1, ::-1] if run.kept else nothing),
        "Each run’s own rule, asked about all frozen tokens.",
    )


# ---- signal and noise ---------------------------------------------------------------------------


def compared_auc(compared: Compared) -> Figure:
    found = last_truth(compared.truth)
    names = [name for name in SCORES if any(name in scores for scores in found.values())]
    return row_figure(
        "AUC of the scores at the end",
        Axis("AUC", "auc"),
        rows(
            compared,
            groups_of(names, [SCORES[name] for name in names]),
            lambda run: np.array([value_of(found, run, name, "auc") for name in names]),
        ),
        "How well each score tells signal from noise, whatever the run selects by: 0.5 is chance.",
    )


def compared_precision(compared: Compared) -> Figure:
    """Of the score that moves with the run: excess loss, where there is a reference."""
    found = last_truth(compared.truth)
    score = next((n for n in SCORES if any(n in scores for scores in found.values())), "")
    columns = [c for c in (compared.truth[0] if compared.truth else {}) if "precision_at_" in c]
    labels = [f"top {100 * float(c.removeprefix('precision_at_')):g}%" for c in columns]
    return row_figure(
        f"Precision of {SCORES[score] if score else 'a score'} at the end",
        share("share of signal in what is kept"),
        rows(
            compared,
            groups_of(columns, labels),
            lambda run: np.array([value_of(found, run, score, column) for column in columns]),
        ),
        "Of the labelled tokens that this score ranks highest, at four ratios.",
    )


Truth = dict[str, dict[str, Row]]  # of each run, of each score


def last_truth(truth: Sequence[Row]) -> Truth:
    """Of all labelled tokens, at the last checkpoint."""
    found: Truth = {}
    for row in truth:  # ascending in tokens seen
        if row["part"] == "all":
            found.setdefault(row["run"], {})[row["score"]] = row
    return found


def value_of(found: Truth, run: Analysis, score: str, column: str) -> float:
    known = run.name in found and score in found[run.name]
    return found[run.name][score][column] if known else np.nan
