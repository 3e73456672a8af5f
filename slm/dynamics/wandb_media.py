"""What is shown of token dynamics beside a run's curves: histograms, tables, a heat-map of text.

Everything is made from an `Analysis` (or, while the run goes on, from one checkpoint's losses) as
plain values that W&B and CSV files take; nothing here needs a network or starts a run.

    dynamics/loss, loss_selected, loss_unselected      means over the frozen tokens, nats
    dynamics/{share,loss,kept_frac}/HH ...             by class, as far as the run has come
    dynamics/excess_loss, excess_loss_selected         histograms
    dynamics/examples, dynamics/heat_map               tokens in their context
    dynamics/by_class, {loss,kept_frac}_by_class       by FINAL class over the whole run
    dynamics/final/share/HH, share_low, share_high     of the run as a whole

What a run does not know (its rule's scores, a class without tokens) is absent, never 0.
"""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis, histogram
from slm.dynamics.class_figures import Shown
from slm.dynamics.classes import ARROWS, CLASSES, MEANING, draw_examples
from slm.dynamics.colours import CLASS_COLOURS, tint
from slm.dynamics.figure import Figure
from slm.dynamics.figures import FIGURES, made
from slm.dynamics.token_set import in_context
from slm.score.token_texts import whole_characters
from slm.train.loggers import Media

EXCESS_BINS, EXCESS_LIMIT_NATS = 64, 8.0  # a quarter of a nat each, 0 is an edge
GROUNDS = {name: tint(colour) for name, colour in CLASS_COLOURS.items()}
Ends = tuple[np.ndarray, np.ndarray]  # losses (M,) at the first and at the last checkpoint
STYLE = """
body{font:13px/1.7 ui-monospace,monospace;color:#111;background:#fff}
p{white-space:pre-wrap;overflow-wrap:anywhere;border-top:1px solid #bbb;padding-top:.6em}
b,span{border-radius:3px;font-weight:normal}
span:empty{padding-left:.4em}
"""


# ---- plain values, and what W&B makes of them ---------------------------------------------------


class Histogram(NamedTuple):
    counts: np.ndarray  # (bins,)
    edges: np.ndarray  # (bins + 1,)

    def for_wandb(self) -> Any:
        import wandb

        return wandb.Histogram(np_histogram=(self.counts, self.edges))


class Rows(NamedTuple):
    columns: list[str]
    rows: list[list[Any]]

    def for_wandb(self) -> Any:
        import wandb

        columns, rows = list[Any](self.columns), list[Any](self.rows)
        return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


class Page(NamedTuple):
    html: str

    def for_wandb(self) -> Any:
        import wandb

        return wandb.Html(self.html, inject=False, data_is_not_path=True)


class Lines(NamedTuple):
    """Curves over tokens seen, each with its own places."""

    title: str
    curves: dict[str, tuple[list[int], list[float]]]

    def for_wandb(self) -> Any:
        import wandb

        places, values = zip(*self.curves.values(), strict=True)
        return wandb.plot.line_series(
            list(places),
            list(values),
            keys=list(self.curves),
            title=self.title,
            xname="tokens seen",
        )


# ---- one checkpoint -----------------------------------------------------------------------------


def dynamics_metrics(
    losses: np.ndarray,  # (M,) nats
    label: np.ndarray | None,  # (M,) uint8: provisional; None: too few checkpoints for a line
    selected: np.ndarray | None,  # (M,) bool; None: unknown
) -> dict[str, float]:
    metrics = means({"dynamics/loss": losses})
    if selected is not None:
        sets = {"selected": losses[selected], "unselected": losses[~selected]}
        metrics |= means({f"dynamics/loss_{name}": values for name, values in sets.items()})
    if label is None:
        return metrics
    for index, name in enumerate(CLASSES):
        mine = label == index
        metrics[f"dynamics/share/{name}"] = float(mine.mean())
        metrics |= means({f"dynamics/loss/{name}": losses[mine]})
        if selected is not None:
            metrics |= means({f"dynamics/kept_frac/{name}": selected[mine]})
    return metrics


def means(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of what has values."""
    return {
        name: float(values.mean(dtype=np.float64))
        for name, values in columns.items()
        if len(values)
    }


def excess_histograms(
    excess_loss: np.ndarray,  # (M,) nats
    selected: np.ndarray | None,  # (M,) bool
) -> dict[str, Media]:
    """One range for all checkpoints and runs; what lies outside is counted in the end bins."""
    found: dict[str, Media] = {"dynamics/excess_loss": excess_histogram(excess_loss)}
    if selected is not None:
        found["dynamics/excess_loss_selected"] = excess_histogram(excess_loss[selected])
    return found


def excess_histogram(values: np.ndarray) -> Histogram:
    edges = np.linspace(-EXCESS_LIMIT_NATS, EXCESS_LIMIT_NATS, EXCESS_BINS + 1)
    return Histogram(histogram(values, edges), edges)


# ---- the whole run ------------------------------------------------------------------------------


def final_media(analysis: Analysis, seed: int = 0) -> dict[str, Media]:
    """What is logged once, at the end."""
    found: dict[str, Media] = {
        "dynamics/by_class": by_class(analysis),
        "dynamics/examples": examples(analysis, seed=seed),
        "dynamics/heat_map": heat_map(analysis, seed=seed),
    }
    drawn = made([kind for kind in FIGURES if kind.wandb], Shown(analysis, seed=seed))
    return found | {
        f"dynamics/{kind.name}": lines_of(figure, kind.wandb) for kind, figure in drawn.items()
    }


def final_summary(analysis: Analysis) -> dict[str, float]:
    """Shares of the final classes with their 95% intervals."""
    return {
        f"dynamics/final/{key}/{name}": value
        for name, share in analysis.shares.items()
        for key, value in (
            ("share", share.share),
            ("share_low", share.low),
            ("share_high", share.high),
        )
    }


def by_class(analysis: Analysis) -> Rows:
    """A row a checkpoint and class; loss and kept_frac are of the final classes."""
    columns = {"share_so_far": analysis.share_history, "loss": analysis.class_losses}
    if analysis.kept is not None:
        columns["kept_frac"] = analysis.kept.by_class
    rows = [
        [int(seen), name, *(known(values[row, index]) for values in columns.values())]
        for row, seen in enumerate(analysis.tokens_seen)
        for index, name in enumerate(CLASSES)
    ]
    return Rows(["tokens_seen", "class", *columns], rows)


def known(value: float) -> float | None:
    """W&B writes NaN as text, which makes a column of numbers one of mixed types."""
    return None if np.isnan(value) else float(value)


def lines_of(figure: Figure, title: str) -> Lines:
    """W&B refuses NaN."""
    curves = {}
    for one in (one for panel in figure.panels for one in panel.series):
        there = ~np.isnan(one.y)
        places = np.asarray(one.x)[there].tolist()
        curves[f"{one.name} {one.note}".strip()] = (places, one.y[there].tolist())
    return Lines(title, curves)


# ---- tokens in their context --------------------------------------------------------------------


def examples(analysis: Analysis, per_class: int = 25, seed: int = 0) -> Rows:
    """Tokens drawn from each class, with what surrounds them."""
    index = np.concatenate(draw_examples(analysis.trajectories.label, per_class, seed))
    found = [in_context(analysis.tokens, int(target)) for target in index]
    columns = {
        "class": [CLASSES[label] for label in analysis.trajectories.label[index]],
        "token": [one.text if one.bytes is None else f"\u27e8{one.bytes}\u27e9" for one in found],
        "before": [one.before for one in found],
        "after": [one.after for one in found],
        **numbers_of(analysis, index),
    }
    return Rows(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def numbers_of(analysis: Analysis, index: np.ndarray) -> dict[str, list[Any]]:
    """Source, losses and times selected of some tokens."""
    sources, excess = analysis.store.sources, analysis.excess_loss(-1)
    columns: dict[str, list[Any]] = {
        "source": [sources[source] for source in analysis.tokens.columns["source"][index]],
        "loss_first": analysis.losses[0][index].tolist(),
        "loss_last": analysis.losses[-1][index].tolist(),
        "delta": analysis.trajectories.delta[index].tolist(),
    }
    if excess is not None:
        reference = analysis.tokens.columns["reference_loss"]
        columns |= {
            "reference_loss": reference[index].tolist(),
            "excess_loss": excess[index].tolist(),
        }
    if analysis.kept is not None:
        columns["times_selected"] = analysis.kept.times[index].tolist()
    return columns


def heat_map(
    analysis: Analysis, num_windows: int = 6, num_tokens: int = 256, seed: int = 0
) -> Page:
    """A static page: the first tokens of some windows, coloured by their final class."""
    count = len(analysis.tokens.windows)
    drawn = np.random.default_rng(seed).choice(count, min(num_windows, count), replace=False)
    starts = np.concatenate([[0], np.cumsum(analysis.tokens.live.sum(1))])
    ends = analysis.losses[0], analysis.losses[-1]
    parts = [
        window_html(analysis, ends, row, int(starts[row]), num_tokens) for row in np.sort(drawn)
    ]
    legend = " ".join(
        f'<b style="background:{GROUNDS[name]}">&nbsp;{escape(class_text(name))} '
        f"{share.share:.1%}&nbsp;</b>"
        for name, share in analysis.shares.items()
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><style>{STYLE}</style>'
    return Page(f"{head}<div>{legend}</div>{''.join(parts)}</html>")


def class_text(name: str) -> str:
    """H→L learned"""
    return f"{ARROWS[name]} {MEANING[name]}"


def window_html(analysis: Analysis, ends: Ends, row: int, start: int, num_tokens: int) -> str:
    """`start`: of the window's targets among all M."""
    tokens = analysis.tokens
    texts = whole_characters([tokens.pieces[int(index)] for index in tokens.tokens[row]])
    live = tokens.live[row][:num_tokens]
    index = start + np.cumsum(live) - 1
    spans = [
        token_html(analysis, ends, int(target), piece) if is_live else escape(piece)
        for target, is_live, piece in zip(index, live, texts[1:], strict=False)
    ]
    return f"<p>{escape(texts[0])}{''.join(spans)}</p>"


def token_html(analysis: Analysis, ends: Ends, target: int, piece: str) -> str:
    name = CLASSES[analysis.trajectories.label[target]]
    first, last = (column[target] for column in ends)
    said = [class_text(name), f"{first:.2f} \u2192 {last:.2f} nats"]
    if "reference_loss" in analysis.tokens.columns:
        said.append(f"reference {analysis.tokens.columns['reference_loss'][target]:.2f}")
    if analysis.kept is not None:
        said.append(f"selected {analysis.kept.times[target]} of {len(analysis.losses)}")
    title, shown = escape(", ".join(said)), escape(piece).replace("\n", "\u21b5\n")
    return f'<span style="background:{GROUNDS[name]}" title="{title}">{shown}</span>'
