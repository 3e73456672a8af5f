"""How well scores tell signal from noise, for the page: a figure and a table of one run.

Made of the rows of truth.py, so that they are computed once.
"""

from collections.abc import Sequence

import numpy as np

from slm.dynamics.analysis import Analysis
from slm.report.page.figures import MARKS, SEEN_AXIS, SHARE, colour, figure, line, titled
from slm.store.columns import COLUMNS
from slm.store.files import Json

SCORES = {  # in the order of the legend
    "excess_loss": "high excess loss",
    "token_loss": "high loss",
    **{c.frozen_name: f"low {c.frozen_name.replace('_', ' ')}" for c in COLUMNS.values()},
    "random": "random",
}
CHANCE = 0.5


def truth_figures(analysis: Analysis, rows: Sequence[Json]) -> Json:
    """Name -> figure; none without labels."""
    if not rows:
        return {}
    kept = {} if analysis.kept is None else {"truth_kept": kept_figure(analysis)}
    return {"truth": truth_figure(rows)} | kept


def truth_figure(rows: Sequence[Json]) -> Json:
    """AUC over training, of all labelled tokens: a line a score."""
    traces = []
    for index, (name, label) in enumerate(SCORES.items()):
        mine = [row for row in rows if row["score"] == name and row["part"] == "all"]
        if mine:
            seen = np.array([row["tokens_seen"] for row in mine])
            values = np.array([row["auc"] for row in mine])
            traces.append(line(label, seen, values, colour(index), MARKS[index]))
    return figure(traces, SEEN_AXIS, titled("AUC", range=[0, 1]))


def kept_figure(analysis: Analysis) -> Json:
    """What the run's rule keeps of signal and of noise."""
    assert analysis.kept is not None, "only where the rule can be asked"
    noise, signal = analysis.kept.by_signal.T
    seen = analysis.tokens_seen
    lines = [
        line("signal", seen, signal, colour(0), MARKS[0]),
        line("noise", seen, noise, colour(1), MARKS[1]),
    ]
    return figure(lines, SEEN_AXIS, titled("share selected", **SHARE))


def truth_table(rows: Sequence[Json]) -> list[Json]:
    """At the last checkpoint: a row a part and score."""
    last = max((row["tokens_seen"] for row in rows), default=0)
    return [
        row | {"label": SCORES[row["score"]], "precision": precision(row)}
        for row in rows
        if row["tokens_seen"] == last
    ]


def precision(row: Json) -> list[float]:
    """At each ratio, ascending."""
    return [value for name, value in row.items() if name.startswith("precision_at_")]


def truth_ratios(rows: Sequence[Json]) -> list[str]:
    first = rows[0] if rows else {}
    return [name.removeprefix("precision_at_") for name in first if name.startswith("precision_")]
