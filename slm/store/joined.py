"""Several corpora of one tokenizer as one, and their references: what a data mixture reads.

Nothing is copied: the shards of one follow those of the other, numbered on. The parts are the
sources of the whole, whatever sources each of them has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.store.fields import of_what
from slm.store.files import Json, hash_json
from slm.store.shards import IDENTITY, SCORED, Corpus, References, Store
from slm.store.sidecars import Shards

# Of a column that not every part has: what the tokens of the others have.
ABSENT = {"masks": np.True_, "signal": np.int8(-1), "weights": np.float32(1)}


@dataclass(frozen=True)
class Joined(Store):
    """Stores one after another: a part's shards, then those of the next."""

    parts: tuple[Store, ...]

    def where(self, index: int) -> tuple[int, int]:
        """Of which part a shard is, and its number there."""
        part = int(np.searchsorted(self.first_shard, index, side="right")) - 1
        return part, index - int(self.first_shard[part])

    @cached_property
    def first_shard(self) -> np.ndarray:  # (parts + 1,)
        return np.cumsum([0, *(len(part.shards) for part in self.parts)])

    def column(self, name: str, index: int) -> Any:
        part, within = self.where(index)
        return self.parts[part].column(name, within)

    def file(self, name: str, index: int) -> Path:
        part, within = self.where(index)
        return self.parts[part].file(name, within)


class JoinedCorpus(Joined, Corpus):
    parts: tuple[Corpus, ...]

    def column(self, name: str, index: int) -> Any:
        """One column of one shard; documents come from the part that they are in."""
        shard, part = self.shards[index], self.where(index)[0]
        if name in ABSENT and name not in shard.rows:
            return np.broadcast_to(ABSENT[name], shard.num_tokens)
        column = super().column(name, index)
        if name == "documents":
            column = np.array(column)  # not the file's
            column[:, 1] = part
        return column

    @property
    def tokenizer_folder(self) -> Path:
        return self.parts[0].tokenizer_folder

    def parts_of(self, windows: np.ndarray) -> np.ndarray:  # (n,) -> (n,) int64
        """Which part each window lies in."""
        first = np.cumsum([0, *(part.num_windows for part in self.parts)])
        return np.searchsorted(first, windows, side="right") - 1


class JoinedReferences(Joined, References):
    parts: tuple[References, ...]

    def check_matches(self, corpus: Corpus) -> None:
        assert isinstance(corpus, JoinedCorpus)
        for store, scored in zip(self.parts, corpus.parts, strict=True):
            store.check_matches(scored)


def join_corpora(named: Mapping[str, Corpus], key: Callable[[str], str]) -> JoinedCorpus:
    """Of one tokenizer and window length.

    key:  where a part stands in the settings, for messages

    Raises:
        UserError: two differ in what decides where a window's tokens are
    """
    (first, one), *others = named.items()
    for name, other in others:
        for field in IDENTITY:
            mine, theirs = one.manifest[field], other.manifest[field]
            if mine != theirs:
                raise UserError(
                    f"{key(name)} ({other.folder}) has {field} {theirs!r}, {key(first)} "
                    f"({one.folder}) {mine!r}{of_what(field, mine)}: a mixture has one"
                )
    return joined(JoinedCorpus, tuple(named.values()), one.manifest | {"sources": [*named]})


def join_references(stores: Sequence[References]) -> JoinedReferences:
    """Each of the corpus at its place; they have the columns that all have."""
    return joined(JoinedReferences, tuple(stores), stores[0].manifest)


def joined(kind: type[Any], parts: tuple[Store, ...], manifest: Json) -> Any:
    prints = hash_json({"joined": [part.fingerprint for part in parts]})
    everywhere = set.intersection(*(part.shards.names for part in parts))
    shards = Shards.joined(
        [part.shards for part in parts], lambda name: name in {*everywhere, *ABSENT, SCORED}
    )
    folder = Path(" + ".join(str(part.folder) for part in parts))
    return kind(folder, manifest | {"fingerprint": prints}, shards, parts)
