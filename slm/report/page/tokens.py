"""Real windows of the frozen set and the numbers of their tokens, as the page's JSON.

Letters: W windows of the set, T positions, M targets, R rows that are shown, n tokens among them
that are targets. A column of numbers has one entry for each of these n, in reading order; `live`
says which positions they belong to.
"""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis
from slm.dynamics.selection_figures import MAX_SOURCES
from slm.dynamics.token_set import TokenSet, is_whole
from slm.prepare.labels import NOISE, SIGNAL, UNKNOWN
from slm.score.token_texts import whole_characters
from slm.store.files import Json

DIGITS = 3  # of a loss in nats: finer than any checkpoint's noise
PATH_POINTS = 16  # checkpoints of the small curve
PER_SOURCE = 5  # examples of what is dropped
LABEL_WORDS = {SIGNAL: "signal", NOISE: "noise", UNKNOWN: "neither"}


class Sample(NamedTuple):
    """Which windows of a token set are shown, and how much of each."""

    rows: np.ndarray  # (R,) ascending
    width: int  # positions of each window, T or fewer


def draw_sample(tokens: TokenSet, most_windows: int, most_tokens: int, seed: int) -> Sample:
    """At most so many windows and tokens; one window at least, cut where it alone is too long."""
    num_windows, length = tokens.live.shape
    width = min(length, most_tokens)
    count = min(num_windows, most_windows, most_tokens // width)
    rows = np.random.default_rng(seed).choice(num_windows, count, replace=False)
    return Sample(rows, width)  # not sorted: windows beside each other are of one source


def shown_targets(tokens: TokenSet, sample: Sample) -> np.ndarray:  # (n,) indices into M
    grid = tokens.spread(np.arange(tokens.num_targets), -1)[sample.rows, : sample.width]
    return grid[grid >= 0]


# ---- text ---------------------------------------------------------------------------------------


def partial_bytes(pieces: Sequence[bytes]) -> dict[int, str]:
    """Position -> bytes, e.g. `e2 80`, of the tokens that are no whole characters."""
    return {
        position: piece.hex(" ") for position, piece in enumerate(pieces) if not is_whole(piece)
    }


def window_texts(tokens: TokenSet, sample: Sample) -> list[Json]:
    """One entry a window; its first token is only ever an input."""
    return [window_text(tokens, row, sample.width) for row in sample.rows]


def window_text(tokens: TokenSet, row: int, width: int) -> Json:
    ids = tokens.tokens[row, : width + 1].tolist()
    pieces = [tokens.pieces[token] for token in ids]
    return {
        "window": int(tokens.windows[row]),
        "ids": ids,
        "texts": whole_characters(pieces),
        "bytes": partial_bytes(pieces),
        "live": [0, *tokens.live[row, :width].astype(int).tolist()],
    }


class Dropped(NamedTuple):
    source: str
    kept: float  # share selected at the last checkpoint
    chosen: np.ndarray  # some tokens that were selected at no checkpoint


def draw_dropped(analysis: Analysis, seed: int) -> list[Dropped]:
    """Of the sources with the most tokens, those of which a token was never selected."""
    if analysis.kept is None:
        return []
    rng, source = np.random.default_rng(seed), analysis.tokens.columns["source"]
    names, never, found = analysis.store.sources, analysis.kept.times == 0, []
    largest = np.argsort(-np.bincount(source, minlength=len(names)), kind="stable")
    for index in largest[:MAX_SOURCES]:
        targets = np.flatnonzero(never & (source == index))
        if len(targets):
            chosen = np.sort(rng.choice(targets, min(PER_SOURCE, len(targets)), replace=False))
            found.append(Dropped(names[index], analysis.kept.by_source[-1, index], chosen))
    return found


# ---- numbers ------------------------------------------------------------------------------------


def token_columns(analysis: Analysis, chosen: np.ndarray) -> Json:  # (n,) indices into M
    """All that is known of these tokens in this run; nats, except for counts."""
    found, tokens = analysis.trajectories, analysis.tokens
    columns: dict[str, Any] = {
        "class": found.label[chosen].tolist(),
        "source": tokens.columns["source"][chosen].tolist(),
        "first": numbers(analysis.losses[0][chosen]),
        "last": numbers(found.last[chosen]),
        "start": numbers(found.start[chosen]),
        "end": numbers(found.end[chosen]),
        "delta": numbers(found.delta[chosen]),
        "variance": numbers(found.variance[chosen]),
        "crossings": found.crossings[chosen].tolist(),
        "first_below": found.first_below[chosen].tolist(),
    }
    if "reference_loss" in tokens.columns:
        reference = tokens.columns["reference_loss"][chosen]
        columns["reference"] = numbers(reference)
        columns["excess"] = numbers(found.last[chosen] - reference)
    if "signal" in tokens.columns:
        columns["label"] = [LABEL_WORDS[int(k)] for k in tokens.columns["signal"][chosen]]
    if analysis.kept is not None:
        columns["times"] = analysis.kept.times[chosen].tolist()
    return columns


def loss_paths(losses: Sequence[np.ndarray], chosen: np.ndarray) -> Json:
    """Losses at some checkpoints, a byte each: value = byte / 255 * top, token after token."""
    places = np.linspace(0, len(losses) - 1, min(len(losses), PATH_POINTS)).round().astype(int)
    found = np.stack([losses[place][chosen] for place in places], axis=1)  # (n, points)
    top = max(float(found.max(initial=0)), 1e-3)
    scaled = (found * (255 / top)).round().astype(np.uint8)
    text = base64.b64encode(scaled.tobytes()).decode()
    return {"points": len(places), "top": round(top, 4), "bytes": text}


def numbers(values: np.ndarray, digits: int = DIGITS) -> list[Any]:
    """Rounded, for JSON: NaN becomes null."""
    rounded = np.round(np.asarray(values, np.float64), digits) + 0.0  # no -0.0
    return [value if np.isfinite(value) else None for value in rounded.tolist()]


def excess_limit(analysis: Analysis) -> float | None:
    """Where the colours of excess loss end, nats: 98 of 100 tokens lie within; None: no scores."""
    if "reference_loss" not in analysis.tokens.columns:
        return None
    excess = analysis.trajectories.last - analysis.tokens.columns["reference_loss"]
    return max(0.1, round(float(np.quantile(np.abs(excess), 0.98)), 1))
