"""What `slm prepare` counts of its results, as report.json has it: by side and by source."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from slm.prepare.sources import Source
from slm.prepare.workers import Result
from slm.store.files import Json

MAX_FAULTS_SHOWN = 10
LABELLED = ("signal", "noise")  # tokens of
LONG = ("long_documents", "long_tokens")  # of sources with weight_long, beyond its `over`
COUNTERS = ("num_faults", "num_short", "num_judged", "num_kept")  # by source
COUNTS = ("documents", "tokens", "bytes", "targets", *LABELLED, *LONG)


@dataclass
class Tally:
    """What the report says, summed over results, and over those of other processes."""

    sources: list[Source]
    counts: np.ndarray = field(init=False)  # (side, source, 8): as in COUNTS
    num_faults: Counter[int] = field(default_factory=Counter)
    num_short: Counter[int] = field(default_factory=Counter)  # documents below min_tokens
    num_judged: Counter[int] = field(default_factory=Counter)  # documents that `keep` looked at
    num_kept: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = np.zeros((2, len(self.sources), len(COUNTS)), dtype=np.int64)
        self.over = np.array([source.long_over for source in self.sources])

    def add(self, result: Result) -> None:
        length, source, _, side, size, *found = result.documents.T
        long = length > self.over[source]
        counts = np.column_stack([np.ones_like(size), length, size, *found, long, length * long])
        np.add.at(self.counts, (side, source), counts)
        self.num_faults.update(source for source, _ in result.faults)
        self.num_short.update(result.short)
        self.num_judged.update(source for source, _ in result.judged)
        self.num_kept.update(source for source, stays in result.judged if stays)
        self.keep_faults(sentence for _, sentence in result.faults)

    def keep_faults(self, sentences: Iterable[str]) -> None:
        self.faults.extend(islice(sentences, MAX_FAULTS_SHOWN - len(self.faults)))

    def to_json(self) -> Json:
        """Of the sources that it saw something of."""
        seen = np.flatnonzero(self.counts.sum(axis=(0, 2))).tolist()
        counts = {str(source): self.counts[:, source].tolist() for source in seen}
        found = {name: vars(self)[name] for name in COUNTERS}
        named = {name: {str(i): n for i, n in of.items()} for name, of in found.items()}
        return {"counts": counts, "faults": self.faults} | named

    def add_json(self, record: Json) -> None:
        for source, counts in record["counts"].items():
            self.counts[:, int(source)] += np.array(counts, np.int64)
        for name in COUNTERS:
            vars(self)[name].update({int(i): number for i, number in record[name].items()})
        self.keep_faults(record["faults"])

    def of_side(self, side: int) -> Json:
        """Targets only where some tokens are none, signal and noise where some are labelled; long
        documents of sources where they have another weight."""
        sources = {
            s.name: self.named(row, [s])
            for s, row in zip(self.sources, self.counts[side], strict=True)
        }
        total = self.counts[side].sum(axis=0)
        return self.named(total, self.sources) | {"sources": sources}

    def named(self, counts: np.ndarray, of: list[Source]) -> Json:  # (8,)
        known = {"targets": any(source.has_masks for source in self.sources)}
        known |= dict.fromkeys(LABELLED, any(source.has_signal for source in self.sources))
        known |= dict.fromkeys(LONG, any(source.weight_long for source in of))
        named = dict(zip(COUNTS, counts.tolist(), strict=True))
        return {name: n for name, n in named.items() if name not in known or known[name]}

    def of_faults(self) -> Json:
        return {
            "skipped": self.num_faults.total(),
            "sources": {s.name: self.num_faults[i] for i, s in enumerate(self.sources)},
            "first": self.faults,
        }

    def of_short(self) -> Json:
        """Of the sources that leave short documents out; empty where none does."""
        return {
            s.name: {"min_tokens": s.min_tokens, "documents": self.num_short[i]}
            for i, s in enumerate(self.sources)
            if s.min_tokens
        }

    def of_kept(self) -> Json:
        """Of the sources of which `keep` saw something; empty where there is none."""
        return {
            s.name: {"documents": self.num_judged[i], "kept": self.num_kept[i]}
            for i, s in enumerate(self.sources)
            if self.num_judged[i]
        }

    def of_left_out(self) -> dict[str, int]:
        """Documents, by the setting that leaves them out."""
        below = self.num_judged.total() - self.num_kept.total()
        return {"min_tokens": self.num_short.total(), "keep": below}
