"""A sample of a corpus: whole documents, of every source its share, as a corpus of its own.

Documents are drawn, not windows: a sample is then a small corpus like any other, which is scored
and trained on as any other, and takes the disk of its own tokens whatever the corpus has. Of every
source as many tokens are drawn as it has of the corpus; the last document drawn of each is cut to
fit. What a draw takes depends on its seed, the corpus and what it must leave out, and not on other
draws.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.overlap import ngram_keys
from slm.prepare.shard_writer import ShardWriter
from slm.store.documents import Documents
from slm.store.files import Json
from slm.store.shards import BY_NEED, FORMAT, IDENTITY, Corpus, adopt_plan, write_manifest

SHARD_TOKENS = 100_000_000
RUN = 32  # tokens in a row: the text in two places is one
COPIED = 0.5  # of a document's runs: it is a copy
MOST_COPIES = 0.1  # of the documents that are drawn
TOKENS_AT_ONCE = 1_000_000
FILL = {"masks": True, "signal": -1, "weights": 1.0}  # of a corpus that lacks the column


class Draw(NamedTuple):
    """Documents of one corpus, ascending, and how many tokens of each."""

    documents: Documents
    chosen: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def by_source(self) -> dict[str, int]:
        """Tokens."""
        names = self.documents.corpus.manifest["sources"]
        sources = self.documents.rows[self.chosen, 1]
        counts = np.bincount(sources, self.lengths, minlength=len(names))
        return {name: int(count) for name, count in zip(names, counts, strict=True)}


class Dtypes(NamedTuple):
    token_dtype: str
    bytes_dtype: str


def draw(
    documents: Documents,
    tokens: int,
    key: Sequence[int],
    without: Collection[int],
    passed: Collection[int] = (),
) -> Draw:
    """So many tokens, or all there are; `without` these documents.

    key:    of the random order
    passed: left out as well; the others stay in their order, and a source in its share
    """
    sizes = np.diff(documents.bounds)
    free = np.ones(len(documents), bool)
    free[list(without)] = False
    order = np.random.default_rng(key).permutation(np.flatnonzero(free))
    sources = documents.rows[:, 1]
    held = np.bincount(sources[free], sizes[free])
    order = order[~np.isin(order, list(passed))]
    parts = [
        first_tokens(order[sources[order] == source], sizes, wanted)
        for source, wanted in enumerate(shares(held, tokens))
    ]
    chosen, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(chosen)
    return Draw(documents, chosen[order], lengths[order])


def shares(held: np.ndarray, tokens: int) -> np.ndarray:  # (sources,) -> (sources,) int64
    """`tokens` in proportion to what each source holds, the rest to the largest remainders."""
    wanted = held * min(1.0, tokens / max(1, held.sum()))
    whole = np.floor(wanted).astype(np.int64)
    missing = min(tokens, int(held.sum())) - int(whole.sum())
    whole[np.argsort(whole - wanted, kind="stable")[:missing]] += 1
    return whole


def first_tokens(
    order: np.ndarray, sizes: np.ndarray, wanted: int
) -> tuple[np.ndarray, np.ndarray]:  # (n,) each
    ends = np.cumsum(sizes[order])
    count = int(np.searchsorted(ends, wanted)) + 1 if wanted else 0
    lengths = sizes[order[:count]].copy()
    if 0 < count <= len(order):  # else there are fewer
        lengths[-1] -= ends[count - 1] - wanted
    return order[:count], lengths


# ---- as a corpus --------------------------------------------------------------------------------


def write_sample(draws: Sequence[Draw], out: Path) -> Corpus:
    """The draws after each other, of corpora of one tokenizer; one that is there is opened."""
    if not (out / "manifest.json").exists():
        shutil.rmtree(out, ignore_errors=True)  # what a kill has left
        write_shards(draws, out)
    return Corpus.open(out)


def write_shards(draws: Sequence[Draw], out: Path) -> None:
    first = draws[0].documents.corpus
    adopt_plan(out, sample_plan([one.documents.corpus for one in draws]))
    shutil.copytree(first.tokenizer_folder, out / "tokenizer")
    needs = {name for one in draws for name in one.documents.corpus.shards.names} & BY_NEED.keys()
    dtypes = Dtypes(*(np.asarray(first.column(n, 0)[:1]).dtype.name for n in ("tokens", "bytes")))
    with ShardWriter(out, first.seq_len, SHARD_TOKENS, dtypes, needs) as writer:
        before = 0
        for one in draws:
            for columns, rows in pieces(one, list(writer.columns)):
                rows[:, 1] += before
                writer.add(columns, rows)
            before += len(one.documents.corpus.manifest["sources"])
        writer.finish()
    if writer.num_shards == 0:
        raise UserError(
            f"a sample of {sum(one.num_tokens for one in draws)} tokens of {first.folder} fills no "
            f"window of {first.seq_len}"
        )
    write_manifest(out, "tokens", writer.num_shards)


def sample_plan(corpora: Sequence[Corpus]) -> Json:
    first = corpora[0].manifest
    kept = {field: first[field] for field in (*IDENTITY, "eos_id")}
    names = [name for corpus in corpora for name in corpus.manifest["sources"]]
    sources = [f"{name} ({i})" if name in names[:i] else name for i, name in enumerate(names)]
    return kept | {"format": FORMAT, "kind": "corpus", "split": "train", "sources": sources}


def pieces(draw: Draw, names: Sequence[str]) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Columns of some documents and their rows (d, 3), as `ShardWriter.add` takes them."""
    cuts = np.flatnonzero(np.diff(np.cumsum(draw.lengths) // TOKENS_AT_ONCE)) + 1
    for numbers in np.split(np.arange(len(draw.chosen)), cuts):
        if len(numbers):
            some = [*zip(draw.chosen[numbers], draw.lengths[numbers], strict=True)]
            columns = {
                name: np.concatenate([column(draw, name, *one) for one in some]) for name in names
            }
            rows = draw.documents.rows[draw.chosen[numbers]]
            yield columns, np.column_stack([draw.lengths[numbers], rows[:, 1:]])


def column(draw: Draw, name: str, document: int, length: int) -> np.ndarray:  # (length,)
    if name in draw.documents.corpus.shards.names or name == "bytes":
        return draw.documents.column(name, document)[:length]
    return np.full(length, FILL[name])


# ---- held-out text ------------------------------------------------------------------------------


class Copies:
    """Documents that stand in held-out text, whole or nearly: what is trained on them says nothing.

    A run is RUN tokens in a row; of a copy the held-out text has COPIED of its runs or more.
    Shorter documents, such as headings, are none.
    """

    def __init__(self, heldout: Mapping[str, Corpus]):
        self.heldout = heldout
        self.runs = {name: runs_in(corpus) for name, corpus in heldout.items()}
        self.seen: dict[Documents, dict[int, str]] = {}  # the set that has it, or ""

    def draw(
        self, documents: Documents, tokens: int, key: Sequence[int], without: Collection[int]
    ) -> Draw:
        """Those that come next in the order take the places of copies."""
        seen = self.seen.setdefault(documents, {})
        while True:
            found = draw(documents, tokens, key, without, [n for n in seen if seen[n]])
            new = [number for number in found.chosen.tolist() if number not in seen]
            if not new:
                return found
            seen |= {number: self.set_of(documents.tokens(number)) for number in new}

    def set_of(self, ids: np.ndarray) -> str:
        own = runs(ids)
        for name, theirs in self.runs.items():
            if len(own) and len(theirs):
                nearest = np.searchsorted(theirs, own).clip(max=len(theirs) - 1)
                if np.mean(theirs[nearest] == own) >= COPIED:
                    return name
        return ""

    def left_out(self) -> dict[str, int]:
        """Documents, by the set that has them; refused where they are many."""
        counts = dict.fromkeys(self.heldout, 0)
        for documents, seen in self.seen.items():
            for name in counts:
                count = sum(found == name for found in seen.values())
                counts[name] += count
                if count > MOST_COPIES * len(seen):
                    raise UserError(
                        f"held-out set {name} ({self.heldout[name].folder}) has {count} of the "
                        f"{len(seen)} documents that were drawn from {documents.corpus.folder} to "
                        "train on: `slm prepare exclude=...` leaves such out of a corpus"
                    )
        return counts


def runs_in(corpus: Corpus) -> np.ndarray:  # sorted, unique
    shards = [corpus.column("tokens", shard) for shard in range(len(corpus.shards))]
    return np.unique(np.concatenate([runs(shard) for shard in shards]))


def runs(ids: np.ndarray) -> np.ndarray:  # (n,) -> (n - RUN + 1,) uint64
    return ngram_keys(ids, RUN) if len(ids) >= RUN else np.empty(0, np.uint64)
