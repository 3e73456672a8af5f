"""A sample of a corpus: whole documents, of every source its share, as a corpus of its own.

Documents are drawn, not windows: a sample is then a small corpus like any other, which is scored
and trained on as any other, and takes the disk of its own tokens whatever the corpus has. Of every
source as many tokens are drawn as it has of the corpus; the last document drawn of each is cut to
fit. What a draw takes depends on its seed and the corpus alone.
"""

import hashlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.shard_writer import ShardWriter
from slm.store.documents import Documents
from slm.store.files import Json
from slm.store.shards import BY_NEED, FORMAT, IDENTITY, Corpus, adopt_plan, write_manifest

SHARD_TOKENS = 100_000_000
DIGESTED = "uint32"  # as which token ids are hashed
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


def draw(documents: Documents, tokens: int, key: Sequence[int], without: Collection[int]) -> Draw:
    """So many tokens, or all there are; `without` these documents.

    key: of the random order
    """
    sizes = np.diff(documents.bounds)
    free = np.ones(len(documents), bool)
    free[list(without)] = False
    sources = documents.rows[:, 1]
    held = np.bincount(sources[free], sizes[free])
    parts = [
        first_tokens(order[sources[order] == source], sizes, wanted)
        for order in [np.random.default_rng(key).permutation(np.flatnonzero(free))]
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
    if count:
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


def check_apart(corpus: Corpus, drawn: Sequence[Draw], name: str, least: int) -> None:
    """A held-out document of at least so many tokens that is trained on says nothing."""
    theirs = set(Documents(corpus).ids_sha256(DIGESTED))
    for one in drawn:
        for number, length in zip(one.chosen, one.lengths, strict=True):
            if length >= least and digest(one.documents, number) in theirs:
                raise UserError(
                    f"held-out set {name} ({corpus.folder}) and {one.documents.name(number)}, "
                    f"which the pilot trains on, have a document of {length} tokens in common: "
                    "`slm prepare exclude=...` leaves such out of a corpus"
                )


def digest(documents: Documents, number: int) -> bytes:
    return hashlib.sha256(documents.tokens(number).astype(DIGESTED).tobytes()).digest()
