"""How well does a score tell signal from noise? Area under the ROC curve and precision at k.

Where the corpus knows which tokens are signal (`signal` or `noise` of a source of `slm prepare`),
every score that a rule ranks by can be judged without training a model for each. Only labelled
tokens count. What is kept, and when it moves:

    excess_loss        HIGH token_loss - reference_loss, at each checkpoint
    token_loss         HIGH, at each checkpoint
    reference_loss     LOW, the same at every checkpoint; so is every other column of a reference
    random             HIGH, a seeded hash, the same: the check, 0.5 but for chance

AUC is the chance that a token of signal ranks above one of noise, ties counting half. It is exact,
from integer counts. Costs a sort of the labelled tokens for each score and checkpoint.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis, as_batch, signal_labels
from slm.dynamics.token_set import TokenSet
from slm.prepare.labels import NOISE, SIGNAL, UNKNOWN
from slm.selection.rules import hashed_scores
from slm.store.columns import COLUMNS

RATIOS = (0.2, 0.4, 0.6, 0.8)
MOST_CHECKPOINTS = 64  # evenly spread, the first and the last among them: each costs sorts

Row = dict[str, Any]


# ---- one score ----------------------------------------------------------------------------------


class Separation(NamedTuple):
    """Of one score, HIGH being kept; all in [0, 1]."""

    auc: float
    precision: tuple[float, ...]  # at each ratio: share of signal in what is kept


def separation(
    score: np.ndarray,  # (n,), finite
    signal: np.ndarray,  # (n,) bool, some of each
    ratios: Sequence[float] = RATIOS,
) -> Separation:
    return Separation(auc(score, signal), tuple(precision_at(score, signal, ratios)))


def auc(score: np.ndarray, signal: np.ndarray) -> float:  # (n,), (n,) bool
    """Chance that a token of signal scores higher than one of noise, ties counting half."""
    _, level, count = np.unique(score, return_inverse=True, return_counts=True)
    hits = np.bincount(level, signal, len(count)).astype(np.int64)  # at each level, ascending
    misses = count - hits
    below = np.cumsum(misses) - misses
    wins_twice = int((hits * (2 * below + misses)).sum())
    return wins_twice / (2 * int(hits.sum()) * int(misses.sum()))


def precision_at(score: np.ndarray, signal: np.ndarray, ratios: Sequence[float]) -> list[float]:
    """Share of signal in the K highest, ties going to the lower index; K as in `select_top_k`."""
    found = np.cumsum(signal[np.argsort(-score, kind="stable")])
    counts = [min(len(score), max(1, int(ratio * len(score) + 0.5))) for ratio in ratios]
    return [float(found[count - 1] / count) for count in counts]


# ---- all scores of a run ------------------------------------------------------------------------


def truth_rows(analysis: Analysis, ratios: Sequence[float] = RATIOS, seed: int = 0) -> list[Row]:
    """One row a part, checkpoint and score; none unless there are tokens of signal and of noise.

    A part is everything that is labelled ("all"), or one of several sources with both labels.
    """
    fixed, rows = fixed_scores(analysis.tokens, seed), []
    for part, (known, signal) in labelled_parts(analysis).items():
        still = {name: separation(score[known], signal, ratios) for name, score in fixed.items()}
        for index in shown_checkpoints(len(analysis.tokens_seen)):
            seen, losses = analysis.tokens_seen[index], analysis.losses[index]
            moving = {
                name: separation(score[known], signal, ratios)
                for name, score in moving_scores(analysis.tokens, losses)
            }
            for name, found in (moving | still).items():
                start = {"run": analysis.name, "part": part, "tokens_seen": int(seen)}
                rows.append(start | {"score": name} | separation_columns(found, signal, ratios))
    return rows


def shown_checkpoints(count: int) -> list[int]:
    places = np.linspace(0, count - 1, min(count, MOST_CHECKPOINTS))
    return np.unique(places.round().astype(int)).tolist()


def labelled_parts(analysis: Analysis) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (indices of tokens with a label (n,), is it signal? (n,)), both labels occurring."""
    labels, source = signal_labels(analysis.tokens), analysis.tokens.columns["source"]
    masks = {"all": labels != UNKNOWN}
    masks |= {
        name: masks["all"] & (source == index) for index, name in enumerate(analysis.store.sources)
    }
    found = {name: (np.flatnonzero(mask), labels[mask] == SIGNAL) for name, mask in masks.items()}
    both = {name: part for name, part in found.items() if part[1].any() and not part[1].all()}
    return both if len(both) > 2 else dict(list(both.items())[:1])  # one source is everything


def moving_scores(tokens: TokenSet, losses: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (M,)) of what one checkpoint says, HIGH being kept."""
    if "reference_loss" in tokens.columns:
        yield "excess_loss", losses - tokens.columns["reference_loss"]
    yield "token_loss", losses


def fixed_scores(tokens: TokenSet, seed: int) -> dict[str, np.ndarray]:
    """name -> (M,), HIGH being kept; `random` ranks as `selection=random` in its first pass."""
    names = [c.frozen_name for c in COLUMNS.values() if c.frozen_name in tokens.columns]
    batch, length = as_batch(tokens), tokens.live.shape[1]
    drawn = hashed_scores(batch["window"], batch["epoch"], length, seed).numpy()
    return {name: -tokens.columns[name] for name in names} | {"random": drawn[tokens.live]}


def separation_columns(found: Separation, signal: np.ndarray, ratios: Sequence[float]) -> Row:
    num_signal = int(signal.sum())
    return {
        "auc": found.auc,
        "base_rate": num_signal / len(signal),
        **{f"precision_at_{k:g}": p for k, p in zip(ratios, found.precision, strict=True)},
        "num_signal": num_signal,
        "num_noise": len(signal) - num_signal,
    }


# ---- the run's own rule -------------------------------------------------------------------------


def kept_rows(analysis: Analysis) -> list[Row]:
    """What the run's rule keeps of signal and of noise at each checkpoint; every token is ranked.

    None where there are no labels of both kinds, or the store lacks scores that the rule needs.
    """
    labels = signal_labels(analysis.tokens)
    num_noise, num_signal = (int((labels == label).sum()) for label in (NOISE, SIGNAL))
    if analysis.kept is None or num_noise == 0 or num_signal == 0:
        return []
    return [
        {
            "run": analysis.name,
            "tokens_seen": int(seen),
            "rule": analysis.kept.rule,
            "kept_of_signal": float(of_signal),
            "kept_of_noise": float(of_noise),
            "num_signal": num_signal,
            "num_noise": num_noise,
        }
        for seen, (of_noise, of_signal) in zip(
            analysis.tokens_seen, analysis.kept.by_signal, strict=True
        )
    ]
