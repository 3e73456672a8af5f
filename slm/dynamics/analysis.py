"""What the stored losses of one run say: classes, their losses, what selection takes of each.

Everything that is shown of token dynamics (W&B, the page, the figures, the command's table) comes
from an `Analysis`, and an `Analysis` from a store alone. Selection is a pure function of the
losses, the stored reference scores and the tokens seen, so no mask is stored: the run's own rule
is asked again, or another one.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm.dynamics.classes import (
    CLASSES,
    THRESHOLD,
    RunningFit,
    Share,
    Trajectories,
    class_losses,
    class_shares,
    classify,
    level_of,
)
from slm.dynamics.token_set import TokenSet, parts
from slm.dynamics.trajectories import TrajectoryStore
from slm.errors import UserError
from slm.prepare.labels import UNKNOWN
from slm.selection.names import selection_name
from slm.selection.registry import make_rule
from slm.selection.rule import Selection
from slm.selection.rules import All
from slm.store.columns import COLUMNS
from slm.store.windows import IGNORE_INDEX, Batch

log = logging.getLogger("slm.dynamics.analysis")


# ---- what a rule selects ------------------------------------------------------------------------


class Chooser:
    """A rule asked about the frozen tokens, `batch_size` windows ranked together.

    The windows of a batch are drawn as in training: stored beside each other they are of one
    source, and a rule that ranks within a batch would keep as much of each source.

    name:  of the rule, for legends
    """

    def __init__(
        self, name: str, tokens: TokenSet, rule: Selection, start: int = 0, batch_size: int = 32
    ):
        self.name, self.tokens, self.start, self.batch_size = name, tokens, start, batch_size
        # A global ranking needs the other ranks; every rank would have these very windows.
        self.rule: Any = replace(rule, scope="batch") if rule.scope == "global" else rule  # type: ignore[type-var]
        self.batch = as_batch(tokens)
        self.order = np.random.Generator(np.random.PCG64(0)).permutation(len(tokens.windows))
        if rule.needs_entropy:
            raise UserError(
                "it needs the entropy of the model's predictions, which trajectories do not have"
            )
        missing = [column for column in rule.needs if column not in self.batch]
        if missing:
            raise UserError(
                f"it needs {', '.join(missing)}, and no references were given "
                "(callbacks.dynamics.references of a training, references of slm dynamics)"
            )

    def selected(self, losses: np.ndarray, tokens_seen: int) -> np.ndarray:  # (M,), -> (M,) bool
        rule = self.rule if tokens_seen >= self.start else All()
        grid = torch.from_numpy(self.tokens.spread(np.asarray(losses, np.float32), 0.0))
        found = np.empty(self.tokens.live.shape, bool)
        for rows in parts(self.order, self.batch_size):
            batch = {name: column[rows] for name, column in self.batch.items()}
            found[rows] = rule.choose(batch, grid[rows], tokens_seen).selected.numpy()
        return found[self.tokens.live]


def as_batch(tokens: TokenSet) -> Batch:
    """The frozen windows as the rules see a batch, without the ids that no rule reads."""
    targets = np.where(tokens.live, tokens.tokens[:, 1:].astype(np.int64), IGNORE_INDEX)
    windows = torch.from_numpy(np.array(tokens.windows))
    batch = {
        "targets": torch.from_numpy(targets),
        "window": windows,
        "epoch": torch.zeros_like(windows),
    }
    for column in COLUMNS.values():
        if column.frozen_name in tokens.columns:
            values = column.frozen(tokens.columns[column.frozen_name])
            batch[column.key] = torch.from_numpy(tokens.spread(values))
    return batch


def chooser_of_run(store: TrajectoryStore) -> Chooser:
    """The rule that the run trained with; UserError where it is unknown or lacks scores."""
    run = store.plan["run"]
    return Chooser(
        selection_name(run["selection"]),
        store.tokens,
        make_rule(run["selection"]),
        run["selection_start"],
        run["micro_batch_size"],
    )


def run_chooser(store: TrajectoryStore, warns: bool = False) -> Chooser | None:
    try:
        return chooser_of_run(store)
    except UserError as error:
        if warns:
            log.warning(
                "%s: nothing on what %s selects: %s",
                *(store.folder, selection_name(store.plan["run"]["selection"]), error),
            )
        return None


# ---- the analysis -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What a rule takes of the frozen tokens at each checkpoint; shares in [0, 1], nats."""

    rule: str
    times: np.ndarray  # (M,) int32: at how many of the checkpoints the token was selected
    by_class: np.ndarray  # (C, 4), NaN for a class without tokens
    by_source: np.ndarray  # (C, S), NaN for a source without tokens
    by_signal: np.ndarray  # (C, 2) of the tokens of noise and of signal, NaN where there are none
    loss_selected: np.ndarray  # (C,), NaN where nothing is selected
    loss_unselected: np.ndarray  # (C,), NaN where everything is


@dataclass(frozen=True)
class Analysis:
    """One run on one token set; C checkpoints, M tokens, S sources."""

    name: str  # of the run, for legends
    arm: str  # runs of one arm differ in their seed alone
    store: TrajectoryStore
    threshold: float  # nats
    mean_loss: float  # the level between L->L and H->H, nats
    tokens_seen: np.ndarray  # (C,) int64
    losses: Sequence[np.ndarray]  # C memory maps (M,), mapped when asked for
    trajectories: Trajectories
    shares: dict[str, Share]  # of each class
    share_history: np.ndarray  # (C, 4): provisional, from the checkpoints until then; NaN for two
    class_losses: np.ndarray  # (C, 4)
    mean_losses: np.ndarray  # (C,)
    chooser: Chooser | None  # the run's rule
    kept: Kept | None  # None: the store lacks scores that the rule needs

    @property
    def tokens(self) -> TokenSet:
        return self.store.tokens

    def excess_loss(self, checkpoint: int) -> np.ndarray | None:  # (M,) nats
        if "reference_loss" not in self.tokens.columns:
            return None
        return self.losses[checkpoint] - self.tokens.columns["reference_loss"]

    @cached_property
    def uneven(self) -> bool:
        """The paper's x is the checkpoint's index: are they evenly spaced in tokens?

        The last gap may be shorter: the end of a run is always looked at.
        """
        gaps = np.diff(self.tokens_seen)
        if gaps[-1] < gaps[-2]:
            gaps = gaps[:-1]
        return bool(gaps.max() > 1.5 * gaps.min())


def analyse(
    store: TrajectoryStore,
    name: str,
    threshold: float = THRESHOLD,
    mean_loss: float | None = None,
    arm: str = "",
    advance: Callable[[int], None] = lambda count: None,
) -> Analysis:
    """`arm`: "" for a run that is one of its own; `advance` is told 1 after each checkpoint."""
    checkpoints = store.checkpoints  # once: a run that still trains adds to them
    losses = store.losses(checkpoints)
    found = classify(losses, threshold, mean_loss)
    tokens_seen = np.array([checkpoint.tokens_seen for checkpoint in checkpoints])
    chooser = run_chooser(store)
    return Analysis(
        name=name,
        arm=arm or name,
        store=store,
        threshold=threshold,
        mean_loss=level_of(losses, mean_loss),
        tokens_seen=tokens_seen,
        losses=losses,
        trajectories=found,
        shares=class_shares(found.label),
        share_history=share_history(losses, threshold, mean_loss),
        class_losses=class_losses(found.label, losses),
        mean_losses=np.array([column.mean(dtype=np.float64) for column in losses]),
        chooser=chooser,
        kept=kept(chooser, found.label, losses, tokens_seen, store, advance) if chooser else None,
    )


def share_history(
    losses: Sequence[np.ndarray], threshold: float, mean_loss: float | None
) -> np.ndarray:  # (C, 4)
    fit, rows = RunningFit(threshold, mean_loss), []
    for column in losses:
        fit.add(column)
        rows.append(shares_of(fit.labels()) if fit.is_ready else np.full(len(CLASSES), np.nan))
    return np.stack(rows)


def shares_of(label: np.ndarray) -> np.ndarray:  # (4,)
    return np.bincount(label, minlength=len(CLASSES)) / len(label)


def kept(
    chooser: Chooser,
    label: np.ndarray,
    losses: Sequence[np.ndarray],
    tokens_seen: np.ndarray,
    store: TrajectoryStore,
    advance: Callable[[int], None],
) -> Kept:
    times = np.zeros(len(label), np.int32)
    source, num_sources = store.tokens.columns["source"], len(store.sources)
    signal = signal_labels(store.tokens)
    known = signal != UNKNOWN
    rows = []
    for column, seen in zip(losses, tokens_seen, strict=True):
        selected = chooser.selected(column, int(seen))
        times += selected
        rows.append(
            (
                rate(selected, label, len(CLASSES)),
                rate(selected, source, num_sources),
                rate(selected[known], signal[known], 2),
                mean_or_nan(column[selected]),
                mean_or_nan(column[~selected]),
            )
        )
        advance(1)
    return Kept(chooser.name, times, *(np.array(list(row)) for row in zip(*rows, strict=True)))


def signal_labels(tokens: TokenSet) -> np.ndarray:  # (M,) int8
    """1 signal, 0 noise, -1 unknown; all unknown where the corpus has no labels."""
    if "signal" in tokens.columns:
        return tokens.columns["signal"]
    return np.full(tokens.num_targets, UNKNOWN, np.int8)


def rate(selected: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:  # (count,)
    """Share of each group that is selected; NaN for an empty one."""
    total = np.bincount(group, minlength=count).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.bincount(group, selected, count) / total


def mean_or_nan(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:  # (n,), (B + 1,) -> (B,)
    """Counts; what lies outside is counted in the outermost bins."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


# ---- the stores of runs -------------------------------------------------------------------------


def store_folders(run: Path) -> list[Path]:
    """The stores of a run: <run>/dynamics/<name>/"""
    return sorted(path.parent for path in (run / "dynamics").glob("*/token_set.json"))
