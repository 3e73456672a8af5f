"""The on-disk format: token shards, aligned reference log-prob shards, their manifests.

A folder holds NumPy ``.npy`` files beside JSON, nothing else::

    corpus/train/    plan.json                what the shards are made of, written first
                     tokens-00000.npy         uint16 or uint32, m * seq_len + 1 tokens
                     documents-00000.npy      int64 (n, 4): start, source, record, first token
                     bytes-00000.npy          UTF-8 bytes of each token
                     masks-00000.npy          bool, only where some tokens are no targets: which are
                     weights-00000.npy        float32, only where some source has weights: what a
                                              token's loss is multiplied by; 0: no target
                     signal-00000.npy         int8, only where some source is labelled: 1 signal,
                                              0 noise, -1 unknown
                     tokens-00000.json        the shard's sidecar: sizes and hashes, written last
                     manifest.json            plan + sidecars + fingerprint; there: whole
    references/x/    logprobs-00000.npy       log p(token i | those before it in its window); and
                                              by option the other columns of slm.store.columns
                     scored-00000.npy         bool, only where some windows have no scores: which
                                              do; a shard without any has this file alone

Window w of a shard reads tokens [w * seq_len, (w + 1) * seq_len], so neighbouring windows share one
token, windows never cross shards, and every token but a shard's first is a target exactly once.
No container notices a flipped byte by itself; the hashes here do (``check="full"``, `slm verify`).
A crash leaves temporary files and files without a sidecar, never something that looks finished.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from slm.checks import CHECKS
from slm.errors import UserError, shown
from slm.store.fields import (
    FILES,
    INDEX,
    OBJECT,
    SIZE,
    TEXT,
    check_fields,
    list_of,
    of_what,
    one_of,
    optional,
)
from slm.store.files import (
    Advance,
    Json,
    check_hash,
    hash_file,
    hash_json,
    nothing,
    read_json,
    write_json,
    write_record,
)
from slm.store.links import Links, TokenBytes
from slm.store.sidecars import Shard, Shards, read_sidecars

FORMAT = 1
# Columns of a corpus beside tokens, bytes and documents, where a source asks for them.
BY_NEED = {"masks": "bool", "signal": "int8", "weights": "float32"}
WEIGHT = "token_weight"  # a column `weights` in batches, datasets and files of other trainers
NONE_AT = {"heldout": 0, "train": 1}  # what `slm prepare` leaves out at the ends of its range
SCORED = "scored"  # of a reference, which windows have scores
EAGERLY = 3000  # files that are looked into when a store is opened, some 100 us each
STORE = {
    "fingerprint": TEXT,
    "tokenizer_sha256": TEXT,
    "vocab_size": SIZE,
    "seq_len": SIZE,
    "packing": one_of("concat", "documents"),
    "shards": list_of(OBJECT),
}
MANIFESTS = {
    "corpus": {"eos_id": INDEX, "sources": list_of(TEXT)},
    "reference": {"corpus_fingerprint": TEXT, "model_sha256": optional(TEXT), "scoring": OBJECT},
    "document_scores": {"model_sha256": TEXT, "scoring": OBJECT, "after": list_of(TEXT)},
}
# Fields of a corpus that decide whether a reference score belongs to a token.
IDENTITY = ("tokenizer_sha256", "vocab_size", "seq_len", "packing")
SHORT = ("context", "stride")  # of references where tokens see fewer than their windows have

# ---- plan and manifest --------------------------------------------------------------------------


def adopt_plan(
    folder: Path, plan: Json, what: str = "another run", advice: str = "another output folder"
) -> None:
    """Write plan.json, or check that the one already there says the same thing."""
    path = folder / "plan.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_record(path, plan)
        return
    found = read_json(path)
    # What both have comes first: that a list is shorter says less than what differs in it.
    both = plan.keys() & found.keys()
    for field in [*sorted(both), *sorted(plan.keys() ^ found.keys())]:
        before, now = found.get(field), plan.get(field)
        if before != now:
            raise UserError(
                f"{folder} holds {what}: {field} is {shown(before)} in plan.json, {shown(now)} now"
                f"{of_what(field, before, now)}; choose {advice}"
            )


def write_manifest(folder: Path, column: str, num_shards: int) -> Json | None:
    """Write manifest.json once all `num_shards` sidecars are present; None before that."""
    shards = read_sidecars(folder, column)
    if [shard.index for shard in shards] != list(range(num_shards)):
        return None
    manifest = make_manifest(folder, shards)
    write_json(folder / "manifest.json", manifest)
    return manifest


def make_manifest(folder: Path, shards: Sequence[Shard]) -> Json:
    """A function of plan.json, the sidecars and, where there is one, the tokenizer's files."""
    body = read_json(folder / "plan.json") | {"shards": [asdict(shard) for shard in shards]}
    made = body | {"fingerprint": fingerprint(body)}
    if (folder / "tokenizer").is_dir():
        files = sorted((folder / "tokenizer").iterdir())
        made["tokenizer_files"] = {path.name: hash_file(path) for path in files}
    return made


def fingerprint(body: Json) -> str:
    """The identity of a folder's content: no path, date or version is in it."""
    keys = [*IDENTITY, *SHORT, "kind", "corpus_fingerprint", "model_sha256"]
    shards = [[shard["num_tokens"], shard["sha256"]] for shard in body["shards"]]
    return hash_json({key: body[key] for key in keys if key in body} | {"shards": shards})


# ---- reading ------------------------------------------------------------------------------------


def why_not(folder: Path) -> str:
    """Why a folder without manifest.json cannot be opened, and what to do."""
    if not folder.exists():
        return f"it does not exist{neighbours(folder)}"
    if (folder / "plan.json").exists() and not (folder / "report.json").exists():
        return "it is unfinished, run the command that makes it again"
    inside = [path.parent.name for path in sorted(folder.glob("*/manifest.json"))]
    if inside and read_json(folder / inside[0] / "manifest.json")["kind"] == "document_scores":
        return "it has scores of documents, which `slm bind` lays onto a corpus"
    return f"name a folder in it: {', '.join(inside)}" if inside else "manifest.json is missing"


def neighbours(folder: Path) -> str:
    """What is there in place of a folder that is not."""
    beside = [str(path.parent) for path in sorted(folder.parent.glob("*/manifest.json"))]
    if not beside:
        return ""
    name = folder.name
    why = f" (heldout_ratio={NONE_AT[name]} makes no {name})" if name in NONE_AT else ""
    return f", there is {' and '.join(beside)}{why}"


def read_manifest(folder: Path, kind: str) -> Json:
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} is not a finished {kind}: {why_not(folder)}")
    manifest = read_json(path)
    for field, expected in (("format", FORMAT), ("kind", kind)):
        found = manifest.get(field)
        if found != expected:
            raise UserError(f"{path}: {field} is {shown(found)}, expected {expected!r}")
    check_fields(path, manifest, STORE | MANIFESTS[kind])
    if manifest["fingerprint"] != fingerprint(manifest):
        raise UserError(f"{path}: its content does not match its fingerprint; it was edited")
    return manifest


@dataclass(frozen=True)
class Store:
    """A finished folder of shards, opened read-only."""

    folder: Path
    manifest: Json  # without its shards, each a kilobyte of objects
    shards: Shards

    @classmethod
    def open(cls, folder: str | os.PathLike[str], check: str = "size"):
        """Open and check a folder. check: "size" (lengths, dtypes) or "full" (hashes as well)."""
        if check not in CHECKS:
            raise UserError(f"check must be one of {CHECKS}, found {check!r}")
        folder = Path(folder)
        manifest = read_manifest(folder, cls.KIND)
        shards = Shards(folder / "manifest.json", manifest.pop("shards"), cls.LEAST_TOKENS)
        store = cls(folder, manifest, shards)
        store.check_files()
        if check == "full":
            store.check_hashes()
        return store

    KIND = "store"
    LEAST_TOKENS = 1  # of a shard

    def __fspath__(self) -> str:
        """So that a store is given where its folder is asked for."""
        return str(self.folder)

    def check_files(self) -> None:
        """Of many files, that they are there: `column` compares sizes of those that are read."""
        if self.shards.num_files <= EAGERLY:
            for shard in self.shards:
                for column in shard.sha256:
                    self.column(column, shard.index)
            return
        there = {*os.listdir(self.folder), *self.links.record["files"]}
        for name in self.shards.file_names():
            if name not in there:
                raise UserError(f"{self.folder / name} is missing")

    def check_hashes(self, advance: Advance = nothing) -> None:
        """Of every column of every shard."""
        for shard in self.shards:
            for column, expected in shard.sha256.items():
                kind, rows = shard.dtype[column], shard.rows[column]
                self.links.check(shard.path(self.folder, column), expected, kind, rows, advance)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def column(self, name: str, index: int) -> Any:
        """One column of one shard, memory-mapped."""
        shard = self.shards[index]
        if name == "bytes" and name not in shard.rows and self.links.any:
            return TokenBytes(self.links.table, self.column("tokens", index))
        if name not in shard.rows:
            raise UserError(f"{self.folder}/manifest.json: shard {index} has no {name}")
        path = shard.path(self.folder, name)
        return self.links.column(path, shard.dtype[name], shard.rows[name])

    def file(self, name: str, index: int) -> Path:
        """Where a column of a shard lies, for messages."""
        return self.links.file(self.shards[index].path(self.folder, name))

    @cached_property
    def links(self) -> Links:
        return Links(self.folder)


class Corpus(Store):
    """Token shards: ``tokens``, ``documents``, ``bytes``; by need those of BY_NEED."""

    KIND = "corpus"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], check: str = "size"):
        """The tokenizer's files are small and what they say is believed: hashed at every check."""
        corpus = super().open(folder, check)
        check_fields(Path(folder) / "manifest.json", corpus.manifest, {"tokenizer_files": FILES})
        for name, expected in corpus.manifest["tokenizer_files"].items():
            check_hash(corpus.tokenizer_folder / name, expected, "manifest.json")
        return corpus

    @property
    def seq_len(self) -> int:
        return self.manifest["seq_len"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @cached_property
    def has_masks(self) -> bool:
        """Some tokens (prompts) are no targets."""
        return "masks" in self.shards.names

    @cached_property
    def has_signal(self) -> bool:
        """Some tokens are known to be signal or noise."""
        return "signal" in self.shards.names

    @cached_property
    def has_weights(self) -> bool:
        """The losses of some tokens count more or less than those of others."""
        return "weights" in self.shards.names

    @cached_property
    def windows_per_shard(self) -> np.ndarray:  # (shards,) int64
        return (self.shards.num_tokens - 1) // self.seq_len

    @cached_property
    def num_windows(self) -> int:
        return int(self.windows_per_shard.sum())

    @property
    def num_targets(self) -> int:
        return self.num_windows * self.seq_len


class References(Store):
    """Shards aligned with a corpus: ``logprobs`` and, by option, others (slm.store.columns)."""

    KIND = "reference"

    @cached_property
    def is_partial(self) -> bool:
        """Some windows have no scores: `slm score max_tokens=...`"""
        return SCORED in self.shards.names

    @property
    def is_unfinished(self) -> bool:
        """These can be scored yet; what `slm bind missing=skip` left out cannot."""
        return self.is_partial and "missing" not in self.manifest

    @property
    def scored(self) -> np.ndarray:  # (windows,) bool, over all shards
        """Which windows have scores."""
        return np.concatenate([self.scored_of(shard) for shard in self.shards])

    def num_scored(self) -> int:
        """The number of these windows."""
        return sum(int(self.scored_of(shard).sum()) for shard in self.shards)

    def scored_of(self, shard: Shard) -> np.ndarray:  # (windows of the shard,) bool
        count = (shard.num_tokens - 1) // self.manifest["seq_len"]
        if SCORED not in shard.sha256:
            return np.ones(count, bool)
        flags = self.column(SCORED, shard.index)
        if len(flags) != count:
            path = shard.path(self.folder, SCORED)
            raise UserError(f"{path} is damaged: it has {len(flags)} windows, the shard {count}")
        return np.asarray(flags)

    @cached_property
    def base(self) -> str | None:
        """The hash of what its model was trained from, or of itself where that was nothing; None
        where no record came with the model."""
        path = self.folder / "lineage.json"
        if not path.exists():
            return None
        record = read_json(path)
        check_fields(path, record, {"init_from_sha256": optional(TEXT)})
        return record["init_from_sha256"] or self.manifest["model_sha256"]

    @property
    def origins(self) -> set[str | None]:
        """Its model and what that was trained from: a tuned one and its base have one in common."""
        return {self.base, self.manifest["model_sha256"]}

    def check_whole(self) -> None:
        if self.is_partial:
            raise UserError(
                f"{self.folder} has scores of {self.num_scored():,} of {len(self.scored):,} "
                "windows, and all are needed here: the same `slm score` without max_tokens scores "
                "the rest, `slm bind` has those of more documents (`slm train` can do with a part)"
            )

    def check_matches(self, corpus: Corpus) -> None:
        """Refuse a reference that was scored on anything but this corpus."""
        theirs, ours = self.manifest["corpus_fingerprint"], corpus.fingerprint
        if theirs == ours:
            self.check_lengths(corpus)
            return
        for field in IDENTITY:
            if self.manifest[field] != corpus.manifest[field]:
                raise UserError(
                    f"{self.folder} does not belong to {corpus.folder}: {field} is "
                    f"{self.manifest[field]!r} in the reference, "
                    f"{corpus.manifest[field]!r} in the corpus"
                    f"{of_what(field, self.manifest[field])}; score this corpus with `slm score`"
                )
        raise UserError(
            f"{self.folder} scores another corpus than {corpus.folder}: corpus fingerprint "
            f"{theirs} in the reference, {ours} in the corpus{of_what('corpus', ours)}; score this "
            "corpus with `slm score`, or give the one that was scored"
        )

    def check_lengths(self, corpus: Corpus) -> None:
        theirs, ours = self.shards.num_tokens.tolist(), corpus.shards.num_tokens.tolist()
        for index, (its, wanted) in enumerate(zip_longest(theirs, ours)):
            if its != wanted:
                raise UserError(
                    f"{self.folder}/manifest.json is damaged: its shard {index} has {its} tokens, "
                    f"that of {corpus.folder} {wanted}"
                )
