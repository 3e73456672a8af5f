"""A reference model over the documents of a corpus, each by itself: `slm score layout=documents`.

The first token of a document is predicted from BOS, or from EOS where the tokenizer has none. A
document of more than `context` tokens is read in windows that begin every `stride` tokens; a token
is taken from the first window that has it, which is the one with most context. A model of another
tokenizer reads the text; see align.py for what becomes of its scores.

Into one store any number of corpora are scored, each into a part of its own
(slm.store.document_scores) that has what the parts before it lack. A shard of the corpus is the
unit of work, as in scorer.py.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm.console import progress
from slm.errors import UserError
from slm.model.architecture import position_limit
from slm.model.build import SelectiveLM, check_model, load_model
from slm.model.device import DTYPES, computing, pick_device
from slm.model.flops import forward_flops_per_token
from slm.model.folder import model_sha256
from slm.model.predict import predicted
from slm.prepare.encoder import encoder_state
from slm.score.cost import copy_lineage, write_cost
from slm.score.pieces import Piece, pieces_of, stride_of
from slm.score.readings import OtherTokens, OwnTokens, Reading
from slm.score.reference import forward_cost, how_it_computes
from slm.score.scorer import Arrays, Scorer, Write, check_space, remove_leftovers, stored
from slm.score.texts import Unreadable
from slm.store.columns import LOGPROBS, columns_named
from slm.store.document_scores import (
    COLUMNS,
    DocumentIndex,
    DocumentScores,
    check_same_reference,
    keys_of,
    prefix_checks,
)
from slm.store.documents import Documents
from slm.store.files import Json, Publish, read_json, write_array
from slm.store.hub import check_model_folder
from slm.store.shards import FORMAT, Corpus, adopt_plan, write_manifest
from slm.store.sidecars import Shard, write_sidecar
from slm.store.tokenizer import (
    load_corpus_tokenizer,
    load_tokenizer,
    spellings,
    tokenizer_sha256,
    with_eos_of,
)
from slm.store.windows import IGNORE_INDEX, Batch, to_device

log = logging.getLogger("slm.score")
SAID = 3  # documents that cannot be read are named, so many of them


# ---- scores of documents ------------------------------------------------------------------------


class DocumentModel:
    """The reference model, as it scores documents."""

    def __init__(self, lm: SelectiveLM, first_token: int, context: int, stride: int, config: Any):
        self.lm, self.first_token, self.context, self.stride = lm, first_token, context, stride
        self.batch_size, self.dtype = config.batch_size, config.dtype
        self.flops = forward_flops_per_token(lm.model, context)

    def pieces(self, counts: Sequence[int]) -> list[Piece]:
        """Of documents of so many tokens, the longest first: what is padded is little."""
        found = [
            piece
            for document, count in enumerate(counts)
            for piece in pieces_of(document, count, self.context, self.stride)
        ]
        return sorted(found, key=lambda piece: -piece.length)

    def batch(self, documents: Sequence[np.ndarray], pieces: Sequence[Piece]) -> Batch:
        """Padded at the right, which no token before sees: (B, T)."""
        shape = (len(pieces), max(piece.length for piece in pieces))
        ids, targets = np.full(shape, self.first_token), np.full(shape, IGNORE_INDEX)
        for row, (document, begin, length, skip) in enumerate(pieces):
            tokens = documents[document]
            targets[row, skip:length] = tokens[begin + skip : begin + length]
            ids[row, int(begin == 0) : length] = tokens[max(0, begin - 1) : begin + length - 1]
        return {"input_ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}

    def logprobs(
        self, documents: Sequence[np.ndarray], advance: Callable[[int], None]
    ) -> list[np.ndarray]:  # (n,) float32 each
        found = [np.full(len(tokens), np.nan, np.float32) for tokens in documents]
        pieces = self.pieces([len(tokens) for tokens in documents])
        for start in range(0, len(pieces), self.batch_size):
            chosen = pieces[start : start + self.batch_size]
            batch = to_device(self.batch(documents, chosen), self.lm.model.device)
            with computing(self.lm.model.device, self.dtype):
                scores = predicted(self.lm, batch, columns_named([]))[LOGPROBS.key]
            values = scores.float().cpu().numpy()
            for row, (document, begin, length, skip) in enumerate(chosen):
                found[document][begin + skip : begin + length] = values[row, skip:length]
            advance(sum(piece.length - piece.skip for piece in chosen))
        return found


# ---- a part of a store --------------------------------------------------------------------------


class DocumentScorer(Scorer):
    """Scores those documents of a corpus that no other part has, shard by shard."""

    def __init__(
        self,
        model: DocumentModel,
        tokens: OwnTokens | OtherTokens,
        todo: np.ndarray,  # (documents,) bool
        out: Path,
        dtype: str,
    ):
        self.model, self.reader, self.todo, self.out, self.dtype = model, tokens, todo, out, dtype
        self.documents, self.corpus = tokens.documents, tokens.documents.corpus
        self.unreadable = 0

    def is_done(self, shard: Shard) -> bool:
        return self.path(shard, ".json").exists()

    def chosen_in(self, shard: Shard) -> list[int]:
        return [number for number in self.documents.of_shard(shard.index) if self.todo[number]]

    def num_tokens(self, shards: list[Shard]) -> int:
        """Of the corpus's tokenizer."""
        sizes = np.diff(self.documents.bounds)
        return sum(int(sizes[self.chosen_in(shard)].sum()) for shard in shards)

    def score_shard(self, shard: Shard, advance: Callable[[int], None]) -> Write:
        start, readings = time.perf_counter(), self.readings(shard)
        expected, own = self.num_tokens([shard]), sum(len(one.tokens) for one in readings)
        pace = expected / max(1, own)  # of another tokenizer's tokens in those of the corpus
        scores = self.model.logprobs(
            [one.tokens for one in readings], lambda count: advance(round(count * pace))
        )
        for reading, values in zip(readings, scores, strict=True):
            if (wrong := LOGPROBS.is_wrong(values)).any():
                place = int(wrong.argmax())
                raise UserError(
                    f"the model gives token {place} of a document of {len(reading.tokens)} in "
                    f"shard {shard.index} {LOGPROBS.refusal(values[place])}"
                )
        cost = forward_cost(self.model.lm, time.perf_counter() - start, own, self.model.flops)
        arrays = columns_of(readings, scores, self.dtype, self.token_dtype)
        return partial(self.write_part, shard, arrays, cost)

    @property
    def token_dtype(self) -> str:
        reader = self.reader
        return (
            reader.encoder if isinstance(reader, OtherTokens) else reader.texts
        ).state.token_dtype

    def readings(self, shard: Shard) -> list[Reading]:
        found = []
        for document in self.chosen_in(shard):
            try:
                found.append(self.reader.read(document))
            except Unreadable as error:
                self.unreadable += 1
                if self.unreadable <= SAID:
                    log.warning("left out: %s", error)
        return found

    def write_part(self, shard: Shard, arrays: Arrays, cost: Json, publish: Publish) -> None:
        hashes = {
            name: write_array(self.path(shard, ".npy", name), array, publish)
            for name, array in arrays.items()
        }
        write_cost(self.out, shard.index, cost)
        dtypes = {name: str(array.dtype) for name, array in arrays.items()}
        rows = {name: len(array) for name, array in arrays.items()}
        done = Shard(shard.index, rows[LOGPROBS.name], hashes, dtypes, rows)
        write_sidecar(self.out, LOGPROBS.name, done, publish)


def columns_of(
    readings: Sequence[Reading], scores: Sequence[np.ndarray], dtype: str, token_dtype: str
) -> Arrays:
    counts = np.array([len(one.tokens) for one in readings], np.int64)
    sizes = np.array([len(one.text.data) for one in readings], np.int64)
    ids = [hashlib.sha256(one.tokens.astype(token_dtype).tobytes()).digest() for one in readings]
    texts = [one.text.sha256 for one in readings]
    checks = [prefix_checks(one.text.data)[np.cumsum(one.sizes)] for one in readings]
    made = {
        "documents": np.column_stack([np.cumsum(counts) - counts, sizes]),
        "texts": keys_of(texts).view(np.uint8).reshape(-1, 32),
        "ids": keys_of(ids).view(np.uint8).reshape(-1, 32),
        "logprobs": stored(LOGPROBS.name, np.concatenate([*scores, np.empty(0, "f4")]), dtype),
        "bytes": np.concatenate([*(one.sizes for one in readings), np.empty(0, np.int64)]),
        "checks": np.concatenate([*checks, np.empty(0, np.uint8)]),
    }
    return {name: made[name].astype(kind or dtype) for name, kind in COLUMNS.items()}


# ---- the command --------------------------------------------------------------------------------


def score_documents(config: Any, corpus: Corpus) -> Path:
    """Into config.out; see slm.score.command.score."""
    part, parts = place_of_part(Path(config.out), corpus)
    check_model_folder("reference_model", config.reference_model, config.check)
    where = pick_device(config.device)
    tokenizer, is_own = reference_tokenizer(config.reference_model, corpus)
    lm = SelectiveLM(load_model(config.reference_model)).eval()
    plan = make_plan(config, corpus, lm, tokenizer, parts)
    for other in parts:
        check_same_reference(other, part, plan)
    documents = Documents(corpus)
    reader = (OwnTokens if is_own else OtherTokens)(documents, tokenizer)
    todo = missing_documents(reader, parts)
    log.info(f"{todo.sum():,} of {len(documents):,} documents are not in {config.out} yet")
    say_what_is_cut(documents, todo)
    if not todo.any():
        return Path(config.out)
    scoring = plan["scoring"]
    log.info(
        "documents are read with a context of %d tokens, every %d (context=, stride=; the model's "
        "positions: %s)",
        *(plan["seq_len"], scoring["stride"], position_limit(lm.model.config) or "any number"),
    )
    sizes = scoring["first_token"], plan["seq_len"], scoring["stride"]
    model = DocumentModel(lm, *sizes, config)
    check_fits(model, reader, todo)
    lm.to(where, DTYPES[config.dtype])
    adopt_plan(part, plan)
    run_scorer(DocumentScorer(model, reader, todo, part, config.store_dtype))
    copy_lineage(config.reference_model, part)
    return Path(config.out)


def reference_tokenizer(name: str, corpus: Corpus) -> tuple[Any, bool]:
    """The reference's tokenizer, and whether it is the corpus's: then its EOS is that one's too.

    An id of another vocabulary means nothing here: that tokenizer keeps its own EOS.
    """
    theirs = load_tokenizer(name, needs_eos=False)
    if theirs.get_vocab() == load_corpus_tokenizer(corpus).get_vocab():
        same = with_eos_of(name, theirs, corpus)
        if {*spellings(same)} & {*spellings(corpus)}:
            return same, True
    if theirs.eos_token_id is None:
        raise UserError(
            f"{name}: eos_token of its tokenizer is null, which is another than that of "
            f"{corpus.folder}: nothing ends its documents; name one in its tokenizer_config.json"
        )
    return theirs, False


def say_what_is_cut(documents: Documents, todo: np.ndarray) -> None:
    """What a corpus dropped at its end was the rest of a document."""
    if todo[-1] and documents.tokens(len(todo) - 1)[-1] != documents.corpus.manifest["eos_id"]:
        log.info(
            "the last of them is a beginning, the end of %s has cut it: it is stored as a text of "
            "its own, and the whole document counts as not scored",
            documents.corpus.folder,
        )


def place_of_part(out: Path, corpus: Corpus) -> tuple[Path, list[DocumentScores]]:
    """The part of a corpus, and those whose documents it leaves out."""
    if (out / "manifest.json").exists() or (out / "plan.json").exists():
        raise UserError(f"{out} holds something else: a store of documents is a folder of parts")
    part = out / corpus.fingerprint[:16]
    others = [path.parent for path in sorted(out.glob("*/manifest.json")) if path.parent != part]
    found = [DocumentScores.open(folder) for folder in others]
    if not (part / "plan.json").exists():
        return part, found
    after = read_json(part / "plan.json")["after"]
    known = {other.fingerprint: other for other in found}
    if gone := [one for one in after if one not in known]:
        raise UserError(
            f"{part}/plan.json: after names a part with fingerprint {gone[0]}, which is not in "
            f"{out}: bring it back, or remove {part}"
        )
    return part, [known[one] for one in after]


def make_plan(
    config: Any, corpus: Corpus, lm: SelectiveLM, tokenizer: Any, parts: Sequence[DocumentScores]
) -> Json:
    """What the scores depend on; context and stride are those of the store where there is one.

    Else the context is the corpus's window length: that of the model's own training where the two
    are of one pipeline, whatever limit its config names.
    """
    limit = position_limit(lm.model.config)
    before = parts[0].manifest if parts else None
    own = min(corpus.seq_len, limit or corpus.seq_len)
    context = config.context or (before["seq_len"] if before else own)
    if limit is not None and context > limit:
        raise UserError(f"context is {context}, model max_position_embeddings is {limit}")
    stride = stride_of(config, context, before["scoring"]["stride"] if before else None)
    bos = tokenizer.bos_token_id
    more = {"stride": stride, "first_token": tokenizer.eos_token_id if bos is None else bos}
    return {
        "format": FORMAT,
        "kind": DocumentScores.KIND,
        "corpus_fingerprint": corpus.fingerprint,
        "model_sha256": model_sha256(config.reference_model),
        "scoring": how_it_computes(config, lm) | more,
        "after": [part.fingerprint for part in parts],
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "vocab_size": encoder_state(tokenizer).vocab_size,
        "seq_len": context,
        "packing": "documents",
    }


def missing_documents(
    reader: OwnTokens | OtherTokens, parts: Sequence[DocumentScores]
) -> np.ndarray:  # (documents,) bool
    """Those that no part has; of equal ones the first."""
    keys = keys_of(list(reader.keys()))
    found = DocumentIndex(parts).find(reader.key, keys) >= 0
    _, first = np.unique(keys, return_index=True)
    is_first = np.zeros(len(keys), bool)
    is_first[first] = True
    return is_first & ~found


def check_fits(model: DocumentModel, reader: OwnTokens | OtherTokens, todo: np.ndarray) -> None:
    """Refuse a model that our loss does not reproduce, and a reference that can read nothing."""
    readings, why = [], None
    for document in np.flatnonzero(todo).tolist():
        try:
            readings.append(reader.read(document).tokens)
        except Unreadable as error:
            why = why or error
        if len(readings) == 2:
            break
    if not readings:
        raise UserError(f"none of {todo.sum():,} documents can be scored: {why}")
    check_model(model.lm, model.batch(readings, model.pieces([len(one) for one in readings])))


def run_scorer(scorer: DocumentScorer) -> None:
    if (todo := scorer.missing()) or not (scorer.out / "manifest.json").exists():
        tokens = scorer.num_tokens(todo)
        check_space(scorer.out, 80 * int(scorer.todo.sum()) + 7 * tokens)
        start = time.perf_counter()
        with progress("scoring", tokens, "tokens") as advance:
            own = scorer.run(advance)
        seconds = time.perf_counter() - start
        log.info(f"scored {own:,} tokens in {seconds:.1f} s ({own / seconds:,.0f} tokens/s)")
        write_manifest(scorer.out, LOGPROBS.name, len(scorer.corpus.shards))
    DocumentScores.open(scorer.out)
    remove_leftovers(scorer.out)
    if scorer.unreadable:
        log.warning(
            f"{scorer.unreadable:,} documents were left out, `slm bind` will count them as missing"
        )
