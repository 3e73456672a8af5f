"""Every figure of token dynamics, one line each: the page, the paper figures and W&B read FIGURES.

To add a figure of a run: a function in a module like class_figures.py that returns a `Figure`, or
raises UserError with the reason why it cannot be drawn, and its line here.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slm.dynamics.class_figures import classes, loss_by_class, shares, trajectories
from slm.dynamics.compared_figures import (
    compared_auc,
    compared_class_losses,
    compared_kept_by_class,
    compared_kept_by_signal,
    compared_kept_by_source,
    compared_losses,
    compared_precision,
    compared_shares,
)
from slm.dynamics.figure import Figure
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


# ---- of several runs: each takes a `Compared` ---------------------------------------------------

COMPARED = (
    Kind(compared_losses, "compared", paper=False),
    Kind(compared_shares, "compared", paper=False),
    Kind(compared_class_losses, "compared", paper=False),
    Kind(compared_kept_by_class, "compared", paper=False),
    Kind(compared_kept_by_source, "compared", paper=False),
    Kind(compared_kept_by_signal, "compared", paper=False),
    Kind(compared_auc, "compared", paper=False),
    Kind(compared_precision, "compared", paper=False),
)
