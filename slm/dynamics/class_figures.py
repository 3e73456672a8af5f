"""Figures of the four classes of tokens: how many, their losses, and some of each."""

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis
from slm.dynamics.classes import ARROWS, CLASSES, MEANING, draw_examples
from slm.dynamics.colours import CLASS_COLOURS, INK, PALETTE
from slm.dynamics.figure import LOSS, SEEN, Figure, Panel, Row, Series, one_panel, picks, share
from slm.train.curves import Curve

EXAMPLES = 5  # tokens of each class
MOST_POINTS = 48  # of a single token's loss: more are a block of colour
# Up and down as the loss goes: a second cue beside the colour.
CLASS_MARKS = {"HH": "square", "LH": "triangle-up", "HL": "triangle-down", "LL": "circle"}
LOSS_FROM_0 = LOSS._replace(from_zero=True)


class Shown(NamedTuple):
    """A run that figures are made of, and what stands beside it."""

    analysis: Analysis
    others: Sequence[Analysis] = ()  # a control may be among them
    heldout: Sequence[Curve] = ()  # labelled with the names of the runs
    heldout_name: str = "held-out text"
    truth: Sequence[Row] = ()  # truth.truth_rows of the run
    seed: int = 0


def class_series(analysis: Analysis, values: np.ndarray) -> list[Series]:  # (C, 4)
    """Of the classes that have tokens."""
    return [
        Series(name, CLASS_COLOURS[name], analysis.tokens_seen, column, ARROWS[name])._replace(
            mark=CLASS_MARKS[name], note=MEANING[name]
        )
        for name, column in zip(CLASSES, values.T, strict=True)
        if not np.isnan(column).all()
    ]


def all_tokens(analysis: Analysis) -> Series:
    return Series("all tokens", INK, analysis.tokens_seen, analysis.mean_losses, dash="dash")


def shares(shown: Shown) -> Figure:
    """Provisional shares thin, the final ones as points with their intervals."""
    series = []
    for one in class_series(shown.analysis, shown.analysis.share_history):
        found = shown.analysis.shares[one.name]
        value, low, high = (np.array([end]) for end in (found.share, found.low, found.high))
        final = one._replace(name=f"{one.name} final", kind="points", note="final")
        series += [one._replace(width=1.5)]
        series += [final._replace(x=one.x[-1:], y=value, low=low, high=high)]
    return one_panel(
        "Shares of the classes over training",
        share("share of tokens"),
        series,
        "Provisional until the end: at each point the classes that follow from the checkpoints "
        "until then, three at least. Large marks: the final shares with 95% bootstrap intervals.",
    )


def loss_by_class(shown: Shown) -> Figure:
    series = class_series(shown.analysis, shown.analysis.class_losses)
    return one_panel(
        "Mean loss of each class",
        LOSS_FROM_0,
        [*series, all_tokens(shown.analysis)],
        "Classes as they are at the end. A falling and a rising class partly follow from how they "
        "are chosen: noise alone would part them too.",
    )


# ---- single tokens ------------------------------------------------------------------------------


def trajectories(shown: Shown) -> Figure:
    """Losses of a few tokens of each class, each followed by its fitted line."""
    groups = draw_examples(shown.analysis.trajectories.label, EXAMPLES, shown.seed)
    chosen = np.concatenate(groups)
    top = 1.05 * max(float(column[chosen].max()) for column in shown.analysis.losses)
    loss = LOSS._replace(bounds=(0.0, top))
    panels = [
        Panel(ARROWS[name], SEEN, loss, trajectory_series(shown.analysis, name, targets))
        for name, targets in zip(CLASSES, groups, strict=True)
    ]
    return Figure("", panels)


def trajectory_series(analysis: Analysis, name: str, targets: np.ndarray) -> list[Series]:
    found, seen = [], analysis.tokens_seen
    places = picks(len(seen), 20)  # straight in the checkpoints' numbers, not always in tokens
    columns = np.array([column[targets] for column in analysis.losses], np.float64)
    for target, losses in zip(targets.tolist(), columns.T, strict=True):
        start, end = analysis.trajectories.start[target], analysis.trajectories.end[target]
        fitted = np.linspace(start, end, len(seen))[places]
        one = Series("loss", CLASS_COLOURS[name], seen, losses, "", width=1.4, target=target)
        line = one._replace(name="fitted", x=seen[places], y=fitted, dash="dot", width=1.2)
        found += [one, line]
    return found


def classes(shown: Shown, num_tokens: int = 3) -> Figure:
    """Rho-1, figure 3: the mean loss of each class, and tokens of L->L and H->H that are restless.

    The tokens are drawn by seed from the twentieth of their class with the highest variance around
    their lines.
    """
    panels = [Panel("class means", SEEN, LOSS, labelled_with_shares(shown.analysis), "classes")]
    for name in ("LL", "HH"):
        chosen = fluctuating(shown.analysis, name, num_tokens, shown.seed)
        title = f"{'' if len(chosen) else 'no '}tokens of {ARROWS[name]}"
        panels.append(Panel(title, SEEN, LOSS, token_series(shown.analysis, chosen), name))
    return Figure("", panels, size=(2.27, 3.4), lettered=True, own_legends=True)


def labelled_with_shares(analysis: Analysis) -> list[Series]:
    return [
        one._replace(
            label=f"{one.text} ({share_text(analysis.shares[one.name].share)} of tokens)", mark=""
        )
        for one in class_series(analysis, analysis.class_losses)
    ]


def share_text(found: float) -> str:
    """A class that has tokens never has 0% of them."""
    return "under 1%" if found < 0.01 else f"{100 * found:.0f}%"


def fluctuating(analysis: Analysis, name: str, count: int, seed: int) -> np.ndarray:
    """Indices of targets."""
    mine = np.flatnonzero(analysis.trajectories.label == CLASSES.index(name))
    order = mine[np.argsort(-analysis.trajectories.variance[mine], kind="stable")]
    pool = order[: max(count, len(mine) // 20)]
    return np.sort(np.random.default_rng(seed).permutation(pool)[:count])


def token_series(analysis: Analysis, targets: np.ndarray) -> list[Series]:
    """At checkpoints spread evenly over all."""
    places = picks(len(analysis.losses), MOST_POINTS)
    seen, found = analysis.tokens_seen[places], []
    columns = np.array([analysis.losses[index][targets] for index in places], np.float64)
    for target, values, colour in zip(targets.tolist(), columns.T, cycle(PALETTE)):  # noqa: B905
        text = analysis.tokens.pieces[int(analysis.tokens.targets[target])].decode(errors="replace")
        found.append(Series(text, colour, seen, values, target=target))
    return found
