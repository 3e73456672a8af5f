"""Several corpora by shares of tokens: `data.mixture`, and the table of what was read of each.

    data.mixture: {web: {corpus: a/train, references: ra, share: 0.6}, code: {corpus: b/train, ...}}

Shares are of training tokens, and of windows alike, which all have as many. Each part is read in an
order of its own, again and again; its epochs follow from its share (Phi-4, arXiv 2412.08905, table
5, has such a table).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.store.files import Json, write_csv
from slm.store.joined import JoinedCorpus, join_corpora, join_references
from slm.store.shards import Corpus, References
from slm.store.windows import Windows
from slm.train.keys import check_mixture, field_of, part_key
from slm.train.order import Mixed

log = logging.getLogger("slm.train")
TABLE = "mixture.csv"


@dataclass(frozen=True)
class Mixture:
    """Its parts, opened, and as one corpus."""

    shares: dict[str, float]
    max_epochs: dict[str, float | None]
    corpus: JoinedCorpus
    windows: Windows
    references: list[References]  # of each part, or none

    @classmethod
    def open(cls, parts: Mapping[str, Mapping[str, Any]], check: str) -> "Mixture":
        """Raises UserError: a part does not fit the others, or its references do not fit it."""
        check_mixture(parts)
        corpora = {name: Corpus.open(part["corpus"], check) for name, part in parts.items()}
        for name, part in corpora.items():
            if part.num_windows == 0:
                raise UserError(
                    f"{part_key(name)}: {part.folder} holds no window of {part.seq_len} tokens"
                )
        folders = [part["references"] for part in parts.values() if field_of(part, "references")]
        references = [References.open(folder, check) for folder in folders]
        corpus = join_corpora(corpora, part_key)
        stores = [join_references(references)] if references else []
        return cls(
            {name: part["share"] for name, part in parts.items()},
            {name: field_of(part, "max_epochs") for name, part in parts.items()},
            corpus,
            Windows(corpus, stores, partial=True),
            references,
        )

    @property
    def sizes(self) -> list[int]:
        """Windows of each part that are there to be read: those with scores."""
        first = np.cumsum([0, *(len(part.shards) for part in self.corpus.parts)])
        return np.diff(self.windows.available.before[first]).tolist()

    def order(self, seed: int, kind: str) -> Mixed:
        return Mixed(self.sizes, [*self.shares.values()], seed, kind)

    def check_epochs(self, num_windows: int, seed: int) -> None:
        """Before a run of so many windows begins."""
        counts = self.order(seed, "keyed").counts(num_windows)
        parts = zip(self.max_epochs.items(), counts, self.sizes, strict=True)
        for place, ((name, most), count, size) in enumerate(parts):
            scores = self.references[place] if self.references else None
            if scores is not None and scores.is_unfinished and count > size:
                raise UserError(
                    f"{part_key(name)} reads {count} windows, and {scores.folder} has scores of "
                    f"{size}: `slm score max_tokens={count * self.corpus.seq_len}` adds what is "
                    "missing"
                )
            if most is not None and count > most * size:
                raise UserError(
                    f"{part_key(name)}.max_epochs is {most:g}, and a share of "
                    f"{self.shares[name]:g} of max_tokens reads its {size} windows "
                    f"{count / size:.2f} times: lower the share, or add text"
                )

    def rows(self, num_windows: int, seed: int, kept: Mapping[str, float]) -> list[Json]:
        """Of each part: its share as asked for and as read, unique tokens, epochs, kept tokens.

        kept:  by source, the mean share of the targets that were selected in the logged steps
        """
        counts = self.order(seed, "keyed").counts(num_windows)
        length = self.corpus.seq_len
        return [
            {
                "part": name,
                "share_asked": share,
                "share_read": count / num_windows,
                "tokens_read": int(count) * length,
                "unique_tokens": min(int(count), size) * length,
                "tokens_there": size * length,
                "epochs": count / size,
                "kept_frac": kept[name] if name in kept else None,
            }
            for (name, share), count, size in zip(
                self.shares.items(), counts, self.sizes, strict=True
            )
        ]


def write_mixture(run: Path, rows: list[Json]) -> None:
    write_csv(run / TABLE, rows)
    log.info("mixture: %s", run / TABLE)
    for row in rows:
        log.info(
            "%s: share %.3f of %.3f asked, %s tokens of %s, %.2f epochs%s",
            *(row["part"], row["share_read"], row["share_asked"], f"{row['tokens_read']:,}"),
            *(f"{row['tokens_there']:,}", row["epochs"]),
            "" if row["kept_frac"] is None else f", kept {row['kept_frac']:.1%}",
        )
