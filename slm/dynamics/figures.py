"""Every figure of token dynamics, one line each: the page, the paper figures and W&B read FIGURES.

To add a figure of a run: a function in a module like class_figures.py that returns a `Figure`, or
raises UserError with the reason why it cannot be drawn, and its line here.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis
from slm.dynamics.class_figures import classes, loss_by_class, shares, trajectories
from slm.dynamics.classes import ARROWS, CLASSES
from slm.dynamics.figure import (
    LOSS,
    Axis,
    Figure,
    Series,
    nth_series,
    one_panel,
    share,
)
from slm.dynamics.selection_figures import (
    auc_of_scores,
    excess_loss,
    kept_frac_by_class,
    kept_frac_by_signal,
    kept_frac_by_source,
    loss_by_selection,
    perplexity,
    selection,
)
from slm.errors import UserError

log = logging.getLogger(__name__)
CLASS_AXIS = Axis("", "class")


class Kind(NamedTuple):
    """A figure by its function, whose name is the figure's: in files, on the page and in W&B."""

    make: Callable[[Any], Figure]
    section: str = ""  # of the page, "": not there
    paper: bool = True  # as PNG, SVG and CSV in figures/
    wandb: str = ""  # its title in W&B, where it is logged at the end; "": not there

    @property
    def name(self) -> str:
        return self.make.__name__


# ---- of one run: each takes a `Shown` -----------------------------------------------------------

FIGURES = (
    Kind(shares, "classes", paper=False),
    Kind(loss_by_class, "classes", paper=False, wandb="loss by final class"),
    Kind(classes),
    Kind(trajectories, "examples", paper=False),
    Kind(kept_frac_by_class, "selection", paper=False, wandb="share kept by final class"),
    Kind(kept_frac_by_source, "selection", paper=False),
    Kind(loss_by_selection, "selection", paper=False),
    Kind(selection),
    Kind(perplexity),
    Kind(excess_loss, "excess", paper=False),
    Kind(auc_of_scores, "truth", paper=False),
    Kind(kept_frac_by_signal, "truth", paper=False),
)


def made(kinds: Sequence[Kind], subject: Any, level: int = logging.DEBUG) -> dict[Kind, Figure]:
    """Those that can be drawn; the log says at `level` why others cannot."""
    found = {}
    for kind in kinds:
        try:
            found[kind] = kind.make(subject)
        except UserError as error:
            log.log(level, "%s is not drawn: %s", kind.name, error)
    return found


# ---- of several runs: each takes their analyses -------------------------------------------------


def compared_losses(analyses: Sequence[Analysis]) -> Figure:
    series = [
        nth_series(index, run.name, run.tokens_seen, run.mean_losses)
        for index, run in enumerate(analyses)
    ]
    return one_panel(
        "Mean loss of the frozen tokens",
        LOSS,
        series,
        "All tokens of the set, selected or not.",
    )


def compared_shares(analyses: Sequence[Analysis]) -> Figure:
    bars = []
    for index, run in enumerate(analyses):
        found = [run.shares[name] for name in CLASSES]
        ends: dict[str, Any] = {
            key: np.array([getattr(one, key) for one in found]) for key in ("low", "high")
        }
        values = np.array([one.share for one in found])
        bars.append(class_bars(index, run, values)._replace(**ends))
    return one_panel(
        "Shares of the classes",
        share("share"),
        bars,
        "At the end of training; bars on top: 95% bootstrap intervals over tokens.",
        CLASS_AXIS,
    )


def compared_class_losses(analyses: Sequence[Analysis]) -> Figure:
    bars = [class_bars(index, run, run.class_losses[-1]) for index, run in enumerate(analyses)]
    return one_panel(
        "Loss of each class at the end",
        LOSS,
        bars,
        "Each run has its own classes: the same token can be in different ones.",
        CLASS_AXIS,
    )


def class_bars(index: int, run: Analysis, values: np.ndarray) -> Series:
    return nth_series(index, run.name, [*ARROWS.values()], values)._replace(kind="bars")


COMPARED = (
    Kind(compared_losses, "compared", paper=False),
    Kind(compared_shares, "compared", paper=False),
    Kind(compared_class_losses, "compared", paper=False),
)
