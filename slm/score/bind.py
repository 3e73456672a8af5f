"""Scores of documents -> references of a corpus: `slm bind` (see `slm bind --help`).

Each document of the corpus is looked up by the hash of its tokens (the reference has the corpus's
tokenizer: an exact copy) or of its text (another tokenizer: align.py). What comes out is a usual
reference folder (slm.store.shards), written shard by shard as by `slm score`. Where what a corpus
dropped at its end cut the last document, it is found by how it begins: what a causal model says of
a token does not depend on those after it. The bytes are those of any other way to get there: killed
and run again, or by several processes at once.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.command_keys import BIND
from slm.console import progress
from slm.errors import UserError, shown
from slm.score.align import shared_logprobs
from slm.score.cost import reference_lineage, references_cost, total
from slm.score.scorer import Arrays, Scorer, Source, check_space, finish, is_finished, store_bytes
from slm.score.texts import Texts, Unreadable
from slm.stage import Folder, stage
from slm.store.columns import DTYPE, LOGPROBS
from slm.store.document_scores import DocumentIndex, DocumentScores, keys_of, open_parts
from slm.store.documents import Documents
from slm.store.files import Json, read_json, write_record
from slm.store.shards import FORMAT, IDENTITY, Corpus, References, adopt_plan
from slm.store.sidecars import Shard
from slm.store.tokenizer import spellings
from slm.store.windows import Windows

log = logging.getLogger("slm.score")
BATCH = 2**18  # tokens that are laid out at once
LOOKED_AT = 1000  # missing documents, for a beginning of theirs


class Pieces(NamedTuple):
    """What some neighbouring windows have of documents, which follow one another."""

    first: int  # document
    places: np.ndarray  # (d,) of each in the index
    edges: np.ndarray  # (d + 1,) in the tokens of the windows
    skips: np.ndarray  # (d,) tokens of each before the windows


class OwnScores:
    """Of a reference with the corpus's tokenizer: copies."""

    def __init__(self, documents: Documents, index: DocumentIndex):
        self.documents, self.index = documents, index
        self.dtype = "uint16" if documents.corpus.vocab_size <= 65536 else "uint32"

    def find(self) -> np.ndarray:  # (documents,) int64, -1: missing
        return self.index.find("ids", keys_of(self.documents.ids_sha256(self.dtype)))

    def lay_out(self, found: np.ndarray, pieces: Pieces) -> None:
        shards = self.index.shard[pieces.places].tolist()
        columns = {one: self.index.shard_column(LOGPROBS.name, one) for one in {*shards}}
        firsts = self.index.first[pieces.places] + pieces.skips
        stops = (firsts + np.diff(pieces.edges)).tolist()
        borders = pairwise(pieces.edges.tolist())
        for shard, first, stop, edges in zip(shards, firsts.tolist(), stops, borders, strict=True):
            found[slice(*edges)] = columns[shard][first:stop]


class OtherScores:
    """Of a reference with another tokenizer: by bytes."""

    def __init__(self, documents: Documents, index: DocumentIndex):
        self.documents, self.index, self.texts = documents, index, Texts(documents)
        self.last: tuple[int, np.ndarray] = -1, np.empty(0)

    def find(self) -> np.ndarray:
        return self.index.find("texts", keys_of(list(self.keys())))

    def keys(self) -> Iterator[bytes]:
        for document in range(len(self.documents)):
            try:
                yield self.texts.read(document).sha256
            except Unreadable:
                yield b""

    def lay_out(self, found: np.ndarray, pieces: Pieces) -> None:
        edges, skips = pieces.edges.tolist(), pieces.skips.tolist()
        for at, place in enumerate(pieces.places.tolist()):
            document, begin, end = pieces.first + at, edges[at], edges[at + 1]
            if document != self.last[0]:  # a long document is asked for again and again
                self.last = document, self.logprobs(document, place)
            found[begin:end] = self.last[1][skips[at] : skips[at] + end - begin]

    def logprobs(self, document: int, place: int) -> np.ndarray:  # (n,) float64
        text = self.texts.read(document)
        logprobs = self.index.column(LOGPROBS.name, place).astype(np.float64)
        sizes = self.index.column("bytes", place).astype(np.int64)
        if not text.is_whole:
            return shared_logprobs(text.sizes, sizes, logprobs)
        body = shared_logprobs(text.sizes[:-1], sizes[:-1], logprobs[:-1])
        return np.append(body, logprobs[-1])  # EOS to EOS


class BoundScores(Source):
    """Where the scores of windows come from: `Source` of scorer.py."""

    columns = (LOGPROBS,)

    def __init__(self, scores: OwnScores | OtherScores, places: np.ndarray, rate: Json | None):
        self.scores_of, self.places, self.rate = scores, places, rate
        self.documents = scores.documents
        self.corpus = self.documents.corpus
        self.windows = Windows(self.corpus)

    def scores(self, numbers: np.ndarray) -> Arrays:
        """Of neighbouring windows of one shard."""
        length, bounds = self.corpus.seq_len, self.documents.bounds
        shard = int(np.searchsorted(self.windows.first_window, numbers[0], side="right")) - 1
        first = (int(numbers[0]) - int(self.windows.first_window[shard])) * length + 1
        start = int(self.documents.before[shard]) + first
        end = start + len(numbers) * length
        found = np.empty(end - start, DTYPE)
        low, high = (np.searchsorted(bounds, [start, end - 1], side="right") - 1).tolist()
        edges, starts = bounds[low : high + 2].clip(start, end) - start, bounds[low : high + 1]
        skips = np.maximum(start - starts, 0)
        self.scores_of.lay_out(found, Pieces(low, self.places[low : high + 1], edges, skips))
        self.leave_out(found, shard, first, starts - start)
        return {LOGPROBS.name: found.reshape(len(numbers), length)}

    def leave_out(self, found: np.ndarray, shard: int, first: int, starts: np.ndarray) -> None:
        """What is no target."""
        if self.corpus.manifest["packing"] == "documents":
            found[starts[starts >= 0]] = np.nan
        if self.corpus.has_masks:
            live = self.corpus.column("masks", shard)[first : first + len(found)]
            found[~live] = np.nan

    def cost(self, seconds: float, tokens: int) -> Json | None:
        """What it had cost to score as many: copying costs nothing beside."""
        if self.rate is None:
            return None
        share = tokens / self.rate["tokens"]
        sums = {
            name: None if self.rate[name] is None else self.rate[name] * share
            for name in ("seconds", "flops")
        }
        return sums | {"tokens": tokens, "device": ", ".join(self.rate["devices"])}


class Binder(Scorer):
    """Writes the windows that are wanted: those without a missing document."""

    def __init__(self, source: BoundScores, out: Path, dtype: str, whole: np.ndarray):
        size = max(1, BATCH // source.corpus.seq_len)
        super().__init__(source, source.corpus, out, size, dtype)
        self.whole = whole  # (windows,) bool

    def wants(self, shard: Shard) -> np.ndarray:
        return self.whole[self.of_shard(shard)]

    def all_batches(self, shard: Shard) -> Iterator[np.ndarray]:
        """Neighbours that are all wanted, or none of them."""
        mine = self.of_shard(shard)
        turns = np.flatnonzero(np.diff(self.whole[mine])) + mine.start + 1
        edges = [mine.start, *turns.tolist(), mine.stop]
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            for start in range(low, high, self.batch_size):
                yield np.arange(start, min(start + self.batch_size, high))


# ---- which documents are there ------------------------------------------------------------------


def find_documents(
    scores: OwnScores | OtherScores,
) -> np.ndarray:  # (documents,) int64, -1: missing
    places = scores.find()
    if len(places) and places[-1] < 0:
        try:
            text = Texts(scores.documents).read(len(places) - 1)
        except Unreadable:
            return places
        if not text.is_whole:
            sizes = text.sizes if isinstance(scores, OwnScores) else None
            places[-1] = scores.index.find_beginning(text.data, sizes)
    return places


def whole_windows(documents: Documents, places: np.ndarray) -> np.ndarray:  # (windows,) bool
    """Those without a target of a missing document."""
    corpus, wanted = documents.corpus, []
    missing = np.flatnonzero(places < 0)
    ends = documents.bounds[missing + 1]
    for shard, count in enumerate(corpus.windows_per_shard):
        starts = documents.before[shard] + 1 + np.arange(count) * corpus.seq_len
        # The first missing document that ends behind the window's start begins behind its end.
        at = np.searchsorted(ends, starts, side="right")
        begins = np.append(documents.bounds[missing], documents.before[-1])[at]
        wanted.append(begins >= starts + corpus.seq_len)
    return np.concatenate([*wanted, np.empty(0, bool)])


def cut_documents(documents: Documents, index: DocumentIndex, absent: list[int]) -> Iterator[str]:
    """What is said of missing ones that were cut: in the corpus that was scored, or in this one."""
    texts = Texts(documents)
    for document in absent[:LOOKED_AT] if index.cut else []:
        with suppress(Unreadable):
            if index.has_beginning(texts.read(document).data):
                name = documents.name(document)
                yield f"of {name} a beginning is there: the corpus that was scored ends within it"
                break
    tokens = documents.tokens(len(documents) - 1)
    if absent[-1] == len(documents) - 1 and tokens[-1] != texts.eos_id:
        yield f"the last one is a beginning itself, {len(tokens)} tokens up to the corpus's end"


def check_missing(
    documents: Documents,
    index: DocumentIndex,
    places: np.ndarray,
    wanted: np.ndarray,
    missing: str,
    stores: list[str],
) -> None:
    absent = np.flatnonzero(places < 0).tolist()
    if not absent:
        return
    said = (
        f"{len(absent):,} of {len(documents):,} documents have no scores in "
        f"{' and '.join(stores)}, e.g. {documents.name(absent[0])}"
    )
    if cut := [*cut_documents(documents, index, absent)]:
        said += f" ({'; '.join(cut)})"
    if missing != "skip":
        raise UserError(
            f"{said}: score them into it (missing=score reference_model=..., or `slm score "
            f"layout=documents corpus={documents.corpus.folder} out={stores[0]} "
            "reference_model=...`), or leave their windows out with missing=skip"
        )
    if not wanted.any():
        raise UserError(f"{said}, and no window is left without them")
    log.warning(
        "%s; %s of %s windows are left out, `slm train` trains on the others alone",
        *(said, f"{(~wanted).sum():,}", f"{len(wanted):,}"),
    )


# ---- the command --------------------------------------------------------------------------------


def check_way(missing: str, reference_model: Folder | None, stores: list[str]) -> bool:
    """Is something to be scored first?"""
    if (missing == "score") != (reference_model is not None):
        raise UserError(
            f"missing is {missing!r} and reference_model {shown(reference_model)}: missing=score "
            "needs the model, and nothing else does"
        )
    if missing == "score" and len(stores) > 1:
        raise UserError(f"missing is 'score' and scores has {len(stores)} stores: give one of them")
    return missing == "score"


def score_missing(corpus: Corpus, store: str, reference_model: Folder | None, check: str) -> None:
    """Into the store, in the precision of what it has."""
    from slm.score.command import score  # imports transformers

    parts = [DocumentScores.open(path.parent) for path in Path(store).glob("*/manifest.json")]
    scoring = {key: value for part in parts[:1] for key, value in part.manifest["scoring"].items()}
    same = {key: scoring[key] for key in ("dtype", "store_dtype") if parts}
    model = {"reference_model": reference_model, "layout": "documents", "check": check}
    score(corpus, store, **model, **same)


def adopt_grown(out: Path, plan: Json) -> None:
    """adopt_plan, of a store that has more parts now: windows are added to those that are there.

    What there was of a window comes from documents that the store still has.
    """
    path = out / "plan.json"
    before = read_json(path) if path.exists() else {}
    is_same = before.keys() == plan.keys() and before | {"scores": plan["scores"]} == plan
    if is_same and {*before["scores"]} < {*plan["scores"]}:
        (out / "manifest.json").unlink(missing_ok=True)
        write_record(path, plan)
    adopt_plan(out, plan)


def make_plan(corpus: Corpus, parts: Sequence[DocumentScores], is_own: bool, missing: str) -> Json:
    first = parts[0].manifest
    scoring = first["scoring"] | {
        "store_dtype": first["scoring"]["store_dtype"] if is_own else DTYPE,
        "layout": "documents",
        "context": first["seq_len"],
        "reference_tokenizer_sha256": first["tokenizer_sha256"],
    }
    body = {
        "format": FORMAT,
        "kind": "reference",
        "corpus_fingerprint": corpus.fingerprint,
        "model_sha256": first["model_sha256"],
        "scoring": scoring,
        "missing": "skip" if missing == "skip" else "refuse",
        "scores": sorted(part.fingerprint for part in parts),
    }
    masks = {"masks": True} if corpus.has_masks else {}
    return body | masks | {field: corpus.manifest[field] for field in IDENTITY}


def warn_of_others(parts: Sequence[DocumentScores]) -> None:
    for name in ("dtype", "store_dtype", "attn_implementation", "device"):
        values = {str(part.manifest["scoring"][name]) for part in parts}
        if len(values) > 1:
            log.warning(
                "the parts were scored with another %s: %s", name, ", ".join(sorted(values))
            )


def cost_of(parts: Sequence[DocumentScores]) -> Json | None:
    costs = [references_cost(part.folder) for part in parts]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or not sum(cost["tokens"] for cost in known):
        return None
    sums = {name: total([cost[name] for cost in known]) for name in ("seconds", "tokens", "flops")}
    return sums | {"devices": sorted({device for cost in known for device in cost["devices"]})}


@stage(BIND)
def bind_scores(
    corpus: Folder,
    scores: Folder | Sequence[Folder],
    out: Folder,
    *,
    missing: str = "refuse",
    reference_model: Folder | None = None,
    check: str = "size",
) -> References:
    """References of a corpus from scores of its documents, wherever these were scored.

    Args:
        corpus: a corpus or its folder, in any order, mixture, window length and packing.
        scores: stores of `score(layout="documents")`, of one reference model.
        out: folder of the log-prob shards; any number of processes may fill one.
        missing: documents without scores: "refuse"; "score": `reference_model` scores them into the
            store first; "skip": windows with a token of one have no scores, and only `slm train`
            takes such references.
        reference_model: folder of the model whose scores these are, for missing="score".
        check: "full" compares every file's hash first.

    Returns:
        The references, as `score` makes them.

    Raises:
        UserError: the stores are of several references or damaged, a document is missing, `out`
            holds other scores.
    """
    opened = Corpus.open(corpus, check)
    folders = [scores] if isinstance(scores, str) else [str(folder) for folder in scores]  # type: ignore[union-attr]
    if check_way(missing, reference_model, folders):
        score_missing(opened, folders[0], reference_model, check)
    parts = open_parts(folders, check)
    warn_of_others(parts)
    documents, index = Documents(opened), DocumentIndex(parts)
    is_own = parts[0].manifest["tokenizer_sha256"] in spellings(opened)
    of_documents = (OwnScores if is_own else OtherScores)(documents, index)
    places = find_documents(of_documents)
    wanted = whole_windows(documents, places)
    check_missing(documents, index, places, wanted, missing, folders)
    plan = make_plan(opened, parts, is_own, missing)
    adopt_grown(Path(out), plan)
    source = BoundScores(of_documents, places, cost_of(parts))
    binder = Binder(source, Path(out), plan["scoring"]["store_dtype"], wanted)
    return write(binder, reference_lineage(parts[0].folder))


def write(binder: Binder, lineage: Json | None) -> References:
    if is_finished(binder):
        return References.open(binder.out)
    todo = binder.missing()
    check_space(binder.out, store_bytes(binder, todo))
    with progress("binding", binder.num_tokens(todo), "tokens") as advance:
        binder.run(advance)
    if lineage is not None:
        write_record(binder.out / "lineage.json", lineage)
    return finish(binder)


def run(**settings: Any) -> None:
    references = bind_scores(**settings)
    log.info(f"references: {references.folder}")
