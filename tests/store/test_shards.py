"""The format on disk: what is refused, what survives a crash."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.errors import UserError
from slm.store.files import (
    read_json,
)
from slm.store.shards import Corpus, References, adopt_plan, fingerprint


@pytest.mark.parametrize("column", ["tokens", "documents", "bytes"])
def test_full_check_names_the_file_with_a_flipped_byte(text_corpus, column):
    path = text_corpus.folder / f"{column}-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    Corpus.open(text_corpus.folder)  # sizes are right
    with pytest.raises(UserError, match=f"{column}-00001.npy is damaged: sha256"):
        Corpus.open(text_corpus.folder, "full")


def test_truncated_extended_missing_and_swapped_files_are_refused(text_corpus):
    path = text_corpus.folder / "tokens-00000.npy"
    data = path.read_bytes()
    for damaged, message in [
        (data[:-2], "tokens-00000.npy is damaged or truncated"),
        (data + b"xx", f"has {len(data) + 2} bytes, its header says {len(data)}"),
        (b"", "tokens-00000.npy is damaged or truncated"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            Corpus.open(text_corpus.folder)
    path.unlink()
    with pytest.raises(UserError, match="tokens-00000.npy is missing"):
        Corpus.open(text_corpus.folder)
    other = text_corpus.folder / "tokens-00001.npy"
    path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="tokens-00000.npy is damaged: sha256"):
        Corpus.open(text_corpus.folder, "full")


def test_edited_newer_and_foreign_manifests_are_refused(text_corpus):
    path = text_corpus.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in [
        ({"seq_len": 8}, "does not match its fingerprint"),
        ({"format": 2}, "format is 2, expected 1"),
        ({"kind": "reference"}, "kind is 'reference', expected 'corpus'"),
    ]:
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=message):
            Corpus.open(text_corpus.folder)
    path.write_text("{")
    with pytest.raises(UserError, match="manifest.json is not valid JSON"):
        Corpus.open(text_corpus.folder)
    path.unlink()
    with pytest.raises(UserError, match="it is unfinished"):
        Corpus.open(text_corpus.folder)
    with pytest.raises(UserError, match="not a finished reference"):
        References.open(text_corpus.folder)


def test_fingerprint_changes_with_order_and_content_but_not_with_place(tmp_path, make_corpus):
    a, b = np.arange(13), np.arange(13, 26)
    first = make_corpus(tmp_path / "first", [a, b], 4).fingerprint
    assert make_corpus(tmp_path / "again", [a, b], 4).fingerprint == first
    assert make_corpus(tmp_path / "swapped", [b, a], 4).fingerprint != first
    assert make_corpus(tmp_path / "packed", [a, b], 4, packing="documents").fingerprint != first
    changed = a.copy()
    changed[5] += 1
    assert make_corpus(tmp_path / "changed", [changed, b], 4).fingerprint != first


def test_plan_of_another_run_is_refused_with_both_values(tmp_path):
    adopt_plan(tmp_path, {"seq_len": 4, "kind": "corpus"})
    adopt_plan(tmp_path, {"seq_len": 4, "kind": "corpus"})
    with pytest.raises(UserError, match="another run: seq_len is 4 in plan.json, 8 now"):
        adopt_plan(tmp_path, {"seq_len": 8, "kind": "corpus"})


def change_manifest(folder: Path, **changes: Any) -> None:
    """With a fingerprint that fits wherever one can be made."""
    manifest = read_json(folder / "manifest.json") | changes
    with suppress(KeyError, TypeError):
        manifest["fingerprint"] = fingerprint(manifest)
    kept = {name: value for name, value in manifest.items() if value is not ...}
    (folder / "manifest.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0, expected a whole number of at least 1"),
        ({"seq_len": "16"}, "seq_len is '16', expected a whole number"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"packing": "none"}, "packing is 'none', expected one of concat, documents"),
        ({"shards": {}}, "shards is {}, expected a list of an object"),
        ({"sources": [1]}, r"sources is \[1\], expected a list of text"),
        ({"tokenizer_files": {"../../x": "a"}}, "tokenizer_files is .*, expected an object"),
        ({"eos_id": ...}, "it has no 'eos_id'"),
    ],
)
def test_a_field_of_a_manifest_that_is_another_thing_is_refused(text_corpus, changes, message):
    change_manifest(text_corpus.folder, **changes)
    with pytest.raises(UserError, match=f"manifest.json.*{message}"):
        Corpus.open(text_corpus.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": "0"}, "index is '0', expected a whole number"),
        ({"index": 7}, r"its shards are numbered \[7, 1\]"),
        ({"num_tokens": None}, "num_tokens is null"),
        ({"dtype": {"tokens": "object"}}, "dtype is .*, expected an object"),
        ({"rows": {"../tokens": 3}}, "rows is .*, expected an object"),
        ({"rows": {"tokens": 3}}, "sha256, dtype and rows of a shard name other columns"),
    ],
)
def test_a_shard_of_a_manifest_that_is_another_thing_is_refused(text_corpus, changes, message):
    shards = read_json(text_corpus.folder / "manifest.json")["shards"]
    change_manifest(text_corpus.folder, shards=[shards[0] | changes, shards[1]])
    with pytest.raises(UserError, match=f"manifest.json.*{message}"):
        Corpus.open(text_corpus.folder)


def test_references_of_other_lengths_are_refused(tmp_path, text_corpus, make_references):
    short = make_references(tmp_path / "short", text_corpus, [np.r_[np.nan, -np.ones(320)]])
    with pytest.raises(UserError, match=r"its shard 1 has None tokens, that of .* 321$"):
        short.check_matches(text_corpus)
