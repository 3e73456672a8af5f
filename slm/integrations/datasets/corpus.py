"""Rows of a Hugging Face dataset -> a corpus and its references: folders that `slm train` takes.

Row w becomes window w. A shard of m rows has m * T + 1 tokens: a window's last target is the first
token of the next row, which is none, and after the last row comes an EOS, which is none either. So
every target of a row is one exactly once. Rows are streamed: memory does not grow with the dataset.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.utils import tqdm

from slm.prepare.encoder import EncoderState, encoder_state
from slm.prepare.imports.rows import Rows, beside, check_dataset, check_labels, read_rows
from slm.store.columns import COLUMNS, DTYPE, LOGPROBS, Column
from slm.store.files import ArrayWriter, Json, atomic_file, naming, write_json
from slm.store.shards import BY_NEED, FORMAT, IDENTITY, adopt_plan, fingerprint, write_manifest
from slm.store.sidecars import Shard, shard_path, write_sidecar
from slm.store.tokenizer import load_tokenizer, tokenizer_sha256
from slm.store.windows import WEIGHT

TOKENS_AT_ONCE = 1 << 20
Columns = dict[str, np.ndarray]


def from_hf_dataset(
    dataset: Dataset,
    out: str | Path,
    tokenizer: str | Path,
    *,
    scored_by: str = "column reference_logprob of a dataset",
    shard_tokens: int = 1 << 25,
) -> Path:
    """Rows of T tokens -> <out>/train, a corpus of windows of T with packing=documents, and where
    there is a column `reference_logprob`, <out>/references for it and for those beside it that
    have the key of another column (slm.store.columns). Returns `out`.

    dataset:    input_ids; by need labels (the token, or -100: no target), reference_logprob (where
                there is a label: finite, <= 0), token_weight (there: finite, >= 0; 0 is no
                target), seq_lengths or position_ids (documents in a row)
    tokenizer:  folder or hub name of the one that made the ids
    scored_by:  who gave the scores, for the model card of what is trained on them

    Each row, or document of a row, is a document: its first token is no target, and nothing
    attends across. A shard ends with one token more, EOS, which closes its last window and is no
    target either. Bytes of tokens are those of the vocabulary's table: exact for byte-level and
    byte-fallback vocabularies. A row that cannot be used is refused, and nothing is left; a killed
    call starts over when it is called again.
    """
    if not isinstance(tokenizer, str | Path):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, it must be a folder or a name"
        )
    rows, out = check_dataset(dataset), Path(out)
    loaded = load_tokenizer(tokenizer)
    state, seq_len = encoder_state(loaded), len(rows[:1]["input_ids"][0])
    if seq_len < 2:
        raise ValueError(f"row 0 has {seq_len} tokens, at least 2 are needed: one predicts another")
    plan = corpus_plan(tokenizer_sha256(loaded), state, seq_len)
    with naming(out):
        take_over(out, plan)
    try:
        with naming(out):
            loaded.save_pretrained(out / "train" / "tokenizer")
            write_folders(rows, out, plan, state, scored_by, shard_tokens)
    except BaseException:
        clear(out)
        raise
    return out


def corpus_plan(tokenizer: str, state: EncoderState, seq_len: int) -> Json:
    return {
        "format": FORMAT,
        "kind": "corpus",
        "tokenizer_sha256": tokenizer,
        "vocab_size": state.vocab_size,
        "eos_id": state.eos_id,
        "seq_len": seq_len,
        "packing": "documents",
        "split": "train",
        "sources": ["dataset"],
    }


def reference_plan(plan: Json, corpus_fingerprint: str, has_masks: bool, scored_by: str) -> Json:
    """A column tells neither the weights nor how they were used."""
    scoring = {
        "dtype": None,
        "store_dtype": "float32",
        "attn_implementation": None,
        "device": None,
        "served_model": scored_by,
    }
    body = {
        "format": FORMAT,
        "kind": "reference",
        "corpus_fingerprint": corpus_fingerprint,
        "model_sha256": None,
        "scoring": scoring,
    }
    masks = {"masks": True} if has_masks else {}
    return body | masks | {field: plan[field] for field in IDENTITY}


def take_over(out: Path, plan: Json) -> None:
    """`out` has neither corpus nor references, or what a killed call of the same kind left."""
    train = out / "train"
    if (train / "manifest.json").exists():
        raise ValueError(f"{train} holds a finished corpus; choose another folder than {out}")
    if not (train / "plan.json").exists():
        for folder in (train, out / "references"):
            if folder.exists():
                raise ValueError(f"{folder} exists already; choose another folder than {out}")
    adopt_plan(train, plan)  # refuses what another command began
    clear(out)  # a killed call may have had other rows
    adopt_plan(train, plan)


def clear(out: Path) -> None:
    for name in ("references", "train"):  # killed in between, train/plan.json still says whose
        shutil.rmtree(out / name, ignore_errors=True)
    if out.exists() and not any(out.iterdir()):
        out.rmdir()


def write_folders(
    rows: Dataset, out: Path, plan: Json, state: EncoderState, scored_by: str, shard_tokens: int
) -> None:
    """Shards of both folders, then the references' manifest, the corpus's last: there, all is."""
    has_masks, scores = "labels" in rows.column_names, score_columns(rows.column_names)
    train, references = out / "train", out / "references"
    dtypes = {"tokens": state.token_dtype, "bytes": state.bytes_dtype, "documents": "int64"}
    has_weights = WEIGHT in rows.column_names
    asked = {"masks": has_masks, "weights": has_weights}
    dtypes |= {name: dtype for name, dtype in BY_NEED.items() if name in asked and asked[name]}
    if scores:
        references.mkdir()
        dtypes |= {column.name: DTYPE for column in scores}
    rows_per_shard = max(1, (shard_tokens - 1) // plan["seq_len"])
    shards = []
    with tqdm(total=len(rows), desc="writing rows", unit=" rows") as bar:
        for index, first in enumerate(range(0, len(rows), rows_per_shard)):
            numbers = range(first, min(first + rows_per_shard, len(rows)))
            columns = shard_columns(rows, numbers, plan, state, bar.update)
            shards.append(write_shard(out, index, columns, dtypes))
    if scores:
        identity = fingerprint(plan | {"shards": [asdict(shard) for shard in shards]})
        write_json(
            references / "plan.json",
            reference_plan(plan, identity, has_masks or has_weights, scored_by),
        )
        write_manifest(references, LOGPROBS.name, len(shards))
    write_manifest(train, "tokens", len(shards))


def write_shard(out: Path, index: int, columns: Iterable[Columns], dtypes: dict[str, str]) -> Shard:
    """Both folders' files of one shard; returns the corpus's sidecar."""
    scores = dtypes.keys() & COLUMNS.keys()
    folders = {name: out / ("references" if name in scores else "train") for name in dtypes}
    with ExitStack() as stack:
        writers = {}
        for name, dtype in dtypes.items():
            file = stack.enter_context(atomic_file(shard_path(folders[name], name, index)))
            writers[name] = ArrayWriter(file, dtype, 4 if name == "documents" else None)
        for block in columns:
            for name, writer in writers.items():
                writer.append(block[name])
        sha256 = {name: writer.finish() for name, writer in writers.items()}
    lengths = {name: writer.length for name, writer in writers.items()}

    def finish(column: str, names: set[str]) -> Shard:
        hashes, kinds = {n: sha256[n] for n in names}, {n: dtypes[n] for n in names}
        shard = Shard(index, lengths["tokens"], hashes, kinds, {n: lengths[n] for n in names})
        write_sidecar(folders[column], column, shard)
        return shard

    if scores:
        finish(LOGPROBS.name, scores)
    return finish("tokens", dtypes.keys() - scores)


def shard_columns(
    rows: Dataset, numbers: range, plan: Json, state: EncoderState, advance: Callable[[int], Any]
) -> Iterator[Columns]:
    """The columns of a shard's rows, block by block, and of the token that closes it."""
    seq_len, start = plan["seq_len"], 0
    step = max(1, TOKENS_AT_ONCE // seq_len)
    for first in range(numbers.start, numbers.stop, step):
        table: Any = rows[first : min(first + step, numbers.stop)]
        found = read_rows(table, first, state.vocab_size)
        check_lengths(found, seq_len)
        yield block_columns(table, found, start, state)
        start += len(found.ids)
        advance(len(found.lengths))
    yield {
        "tokens": np.array([state.eos_id]),
        "bytes": np.zeros(1, np.int64),
        "documents": np.array([[start, 0, numbers.stop - 1, seq_len]]),
        "masks": np.zeros(1, bool),
        "weights": np.ones(1),
        **{name: np.full(1, np.nan) for name in COLUMNS},
    }


def check_lengths(rows: Rows, seq_len: int) -> None:
    wrong = np.flatnonzero(rows.lengths != seq_len)
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"row {rows.number + row}: input_ids has {rows.lengths[row]} tokens, row 0 has "
            f"{seq_len}: all rows must be of one length"
        )


def block_columns(table: Any, rows: Rows, start: int, state: EncoderState) -> Columns:
    """start: place of the first row in its shard. A document's record is its row."""
    at = np.flatnonzero(rows.first)
    row, offset = np.divmod(at, rows.lengths[0])
    columns = {
        "tokens": rows.ids,
        "bytes": state.bytes_table[rows.ids],
        "documents": np.column_stack([start + at, 0 * at, rows.number + row, offset]),
    }
    live = np.ones(len(rows.ids), bool)
    if "labels" in table.column_names:
        live = columns["masks"] = check_labels(rows, beside(table, "labels", rows))
    if WEIGHT in table.column_names:
        columns["weights"] = check_weights(rows, beside(table, WEIGHT, rows), live)
        live = live & (columns["weights"] != 0)
    for column in score_columns(table.column_names):
        scores = beside(table, column.key, rows)
        columns[column.name] = check_scores(rows, column, scores, live & ~rows.first)
    return columns


def check_weights(rows: Rows, weights: np.ndarray, live: np.ndarray) -> np.ndarray:  # (n,) each
    """1 where a token is no target and its weight no number."""
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if (wrong & live).any():
        at = int((wrong & live).argmax())
        raise ValueError(
            f"{rows.place(WEIGHT, at)} is {weights[at]} under the label {rows.ids[at]}, a finite "
            "number of at least 0 is needed"
        )
    return np.where(wrong, np.float32(1), weights)


def score_columns(names: Sequence[str]) -> list[Column]:
    """Of a dataset: none without what every store has."""
    found = [column for column in COLUMNS.values() if column.key in names]
    if found and LOGPROBS not in found:
        raise ValueError(f"the dataset has {found[0].key} and no {LOGPROBS.key}")
    return found


def check_scores(
    rows: Rows, column: Column, scores: np.ndarray, live: np.ndarray
) -> np.ndarray:  # (n,) each
    wrong = np.flatnonzero(live & column.is_wrong(scores))
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"{rows.place(column.key, at)} is {scores[at]} under the label {rows.ids[at]}, "
            f"{column.needed}"
        )
    return np.where(live, scores, np.float32(np.nan))
