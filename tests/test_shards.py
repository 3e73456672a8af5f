"""The format on disk: what is refused, what survives a crash."""

import json
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm import shards
from slm.errors import UserError
from slm.shards import (
    ArrayWriter,
    Corpus,
    References,
    adopt_plan,
    atomic_file,
    fingerprint,
    hash_file,
    map_array,
    read_json,
    write_array,
    write_record,
)


def test_array_writer_equals_numpy_save(tmp_path):
    whole = np.arange(1000, dtype=np.uint16)
    with atomic_file(tmp_path / "a.npy") as file:
        writer = ArrayWriter(file, "uint16")
        for block in np.split(whole, [1, 500, 500, 999]):
            writer.append(block)
        digest = writer.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), whole)
    assert digest == shards.hash_file(tmp_path / "a.npy")
    assert np.array_equal(map_array(tmp_path / "a.npy", "uint16", 1000), whole)


def test_array_writer_with_columns(tmp_path):
    rows = np.arange(12).reshape(3, 4)
    with atomic_file(tmp_path / "a.npy") as file:
        writer = ArrayWriter(file, "int64", columns=4)
        writer.append(rows[:1])
        writer.append(rows[1:])
        writer.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.npy") as file:
        file.write(b"half")
        raise RuntimeError("crash")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("cannot reach"),
        FileNotFoundError(2, "No such file", "/other/a"),
        BrokenPipeError(32, "Broken pipe"),
    ],
)
def test_only_a_failed_write_is_said_to_be_one(tmp_path, error):
    """A writer may say no more than that it wrote too little."""
    expected = UserError if error.errno is None else type(error)
    with pytest.raises(expected), atomic_file(tmp_path / "a.npy"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_the_file(tmp_path):
    with pytest.raises(UserError, match="/none/a.json cannot be written: No such file or dir"):
        write_record(tmp_path / "none" / "a.json", {})


def test_kill_during_a_write_leaves_no_finished_file(tmp_path):
    code = (
        "import os, pathlib, sys; from slm.shards import atomic_file\n"
        "with atomic_file(pathlib.Path(sys.argv[1]) / 'a.npy') as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.npy.") and left.suffix == ".tmp"
    write_record(tmp_path / "b.json", {})  # another file's temporary may be another's to remove
    assert left.exists()
    write_array(tmp_path / "a.npy", np.zeros(3))
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "b.json"}


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


def test_wrong_dtype_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4, dtype=np.int64))
    with pytest.raises(UserError, match="holds 4 rows of int64, its manifest says 4 of uint16"):
        map_array(tmp_path / "a.npy", "uint16", 4)


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


# ---- what comes from anybody's disk -------------------------------------------------------------


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
        ({"num_tokens": None}, "num_tokens is None"),
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


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\xff", "1" * 5000])
def test_json_that_is_none_is_one_kind_of_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_every_flipped_bit_of_a_header_is_one_kind_of_error_or_none(tmp_path):
    path = tmp_path / "a.npy"
    write_array(path, np.arange(40, dtype=np.int64).reshape(10, 4))
    whole = path.read_bytes()
    for position in range(8 * 128):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, of headers that Python 2 wrote
            with suppress(UserError):
                assert map_array(path, "int64", 10).nbytes == 320


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, hash_file, lambda path: map_array(path, "int64", 1)):
        with pytest.raises(UserError, match="pipe is no regular file"):
            read(tmp_path / "pipe")


def test_a_sealed_record_reads_as_it_was_written_and_every_flip_is_found(tmp_path):
    path, record = tmp_path / "a.json", {"a": [1, 2.5, None], "b": {"c": "d", "3": float("inf")}}
    write_record(path, record)
    assert read_json(path) == record
    whole = path.read_bytes()
    for position in [n for n, byte in enumerate(whole) if byte not in b" \n"]:
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        with suppress(UserError):  # a seal of another name is an unknown field beside the others
            assert record.items() < read_json(path).items()


def test_references_of_other_lengths_are_refused(tmp_path, text_corpus, make_references):
    short = make_references(tmp_path / "short", text_corpus, [np.r_[np.nan, -np.ones(320)]])
    with pytest.raises(
        UserError, match=r"its shards have \[321\] tokens, those of .* \[321, 321\]"
    ):
        short.check_matches(text_corpus)
