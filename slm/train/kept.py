"""What a rule keeps of a whole corpus, and of each of its documents.

The losses of the model are those of a store that `slm score` made of it, so nothing is computed
here but the rule. Windows that a rule with scope=batch ranks together are drawn as in training:
stored beside each other they are of one source, and as much of every source would be kept.

n tokens of all shards end to end, d documents.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm.console import progress
from slm.errors import UserError
from slm.prepare.export_rows import lengths
from slm.selection.rule import ENTROPY, Selection
from slm.store.documents import Documents
from slm.store.shards import Corpus
from slm.store.windows import IGNORE_INDEX, Batch, Windows
from slm.train.order import Order

NONE, CANDIDATE, KEPT = 0, 1, 2  # of a token: the rule did not see it, saw it, keeps it
DOCUMENTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Kept:
    """Memory-mapped, in a folder of the caller's."""

    state: np.ndarray  # (n,) uint8
    excess: np.ndarray | None  # (n,) float32, nats, NaN where not both scores are known

    @classmethod
    def of(
        cls,
        rule: Selection,
        windows: Windows,  # with the references
        losses: Windows | None,  # of the same corpus, the scores of the model in their place
        folder: Path,
        *,
        together: int,
        seed: int,
        tokens_seen: int,
    ) -> "Kept":
        """Asks the rule once about every window, `together` of them at a time.

        tokens_seen: where a schedule stands
        """
        rule = alone(rule)
        total = sum(lengths(windows.corpus))
        kept = cls(
            new_array(folder / "state.npy", np.uint8, total, NONE),
            None
            if losses is None or not windows.references
            else new_array(folder / "excess.npy", np.float32, total, np.nan),
        )
        places, order = first_targets(windows.corpus), Order(len(windows), seed)
        with progress("asking the rule", len(windows), "windows") as advance:
            for start in range(0, len(windows), together):
                numbers, epochs = order.samples(start, min(start + together, len(windows)))
                batch = windows.batch(numbers) | {"epoch": torch.from_numpy(epochs)}
                seen = {} if losses is None else losses.batch(numbers)
                loss = -seen["reference_logprob"] if seen else None
                if rule.needs_entropy:
                    batch[ENTROPY] = seen["reference_entropy"]
                state, excess = asked(rule, batch, loss, tokens_seen)
                at = places[numbers][:, None] + np.arange(windows.corpus.seq_len)
                kept.state[at] = state
                if kept.excess is not None:
                    kept.excess[at] = excess
                advance(len(numbers))
        return kept


def alone(rule: Selection) -> Selection:
    """A ranking over all ranks is one over this process's windows."""
    other: Any = rule
    return replace(other, scope="batch") if rule.scope == "global" else rule


def asked(
    rule: Selection,
    batch: Batch,
    loss: torch.Tensor | None,  # (B, T), NaN where a token is no target
    tokens_seen: int,
) -> tuple[np.ndarray, np.ndarray]:  # (B, T) each
    known = None if loss is None else loss.masked_fill(batch["targets"] == IGNORE_INDEX, 0.0)
    selected, candidates = rule.choose(batch, known, tokens_seen).selected, rule.candidates(batch)
    excess = torch.full(selected.shape, torch.nan)
    if known is not None and "reference_logprob" in batch:
        excess = (known + batch["reference_logprob"]).masked_fill(~candidates, torch.nan)
    return (candidates.to(torch.uint8) + selected.to(torch.uint8)).numpy(), excess.numpy()


def new_array(path: Path, dtype: Any, length: int, fill: float) -> np.ndarray:  # (length,)
    array = np.lib.format.open_memmap(path, "w+", dtype, (length,))
    array[:] = fill
    return array


def first_targets(corpus: Corpus) -> np.ndarray:  # (windows,) int64
    """Where among the n tokens the first target of each window stands."""
    before = np.cumsum([0, *lengths(corpus)])[:-1]
    return np.concatenate(
        [
            offset + 1 + np.arange(count) * corpus.seq_len
            for offset, count in zip(before, corpus.windows_per_shard, strict=True)
        ]
    )


# ---- documents ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """What a rule keeps of each document; (d,) each."""

    begins: np.ndarray  # int64, among the n tokens
    ends: np.ndarray
    source: np.ndarray  # index into the corpus's sources
    record: np.ndarray
    candidates: np.ndarray  # how many of its tokens the rule could take
    kept: np.ndarray  # and took
    excess: np.ndarray  # float64, mean over its candidates, nats; NaN where it is not known

    @property
    def share(self) -> np.ndarray:
        """Kept of the candidates; NaN of none."""
        return np.where(self.candidates > 0, self.kept / np.maximum(1, self.candidates), np.nan)

    @property
    def tokens(self) -> np.ndarray:
        return self.ends - self.begins


def documents_of(corpus: Corpus, kept: Kept) -> Shares:
    documents = Documents(corpus)
    begins, ends, rows = documents.rows[:, 0], documents.bounds[1:], documents.rows
    sums = [
        sums_of(kept, begins[first : first + DOCUMENTS_AT_ONCE], ends[first:][:DOCUMENTS_AT_ONCE])
        for first in range(0, len(ends), DOCUMENTS_AT_ONCE)
    ]
    candidates, selected, excess = np.concatenate(sums, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = excess / candidates
    counts = candidates.astype(np.int64), selected.astype(np.int64)
    return Shares(begins, ends, rows[:, 1], rows[:, 2], *counts, mean)


def sums_of(kept: Kept, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:  # (3, documents)
    """Candidates, kept tokens, and the candidates' excess loss; of neighbours."""
    mine = slice(begins[0], ends[-1])
    state, starts = kept.state[mine], begins - begins[0]
    excess = np.full(len(state), np.nan) if kept.excess is None else kept.excess[mine]
    terms = (state >= CANDIDATE, state == KEPT, np.where(state >= CANDIDATE, excess, 0.0))
    return np.stack([np.add.reduceat(term, starts, dtype=np.float64) for term in terms])


def choose(
    found: Shares, by: str, least: float | None, max_tokens: int | None
) -> np.ndarray:  # (d,) bool
    """Documents of at least `least`; of these the highest, ties to the first, that fit."""
    value = {"share": found.share, "excess": found.excess}[by]
    if least is None and max_tokens is None:
        return np.ones(len(value), bool)
    taken = ~np.isnan(value)
    if least is not None:
        taken &= value >= least
    if not taken.any():
        most = max(value[~np.isnan(value)], default=np.nan)
        raise UserError(f"least is {least}, the highest {by} of a document is {most:g}")
    if max_tokens is None:
        return taken
    ranked = np.argsort(np.where(taken, -value, np.inf), kind="stable")[: np.count_nonzero(taken)]
    fits = np.cumsum(found.tokens[ranked]) <= max_tokens
    if not fits.any():
        raise UserError(
            f"max_tokens is {max_tokens}, the document of the highest {by} has "
            f"{found.tokens[ranked[0]]}"
        )
    taken[ranked[~fits]] = False
    return taken
