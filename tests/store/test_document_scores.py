"""Hashes of beginnings, and what a damaged part of a store says."""

import json
from pathlib import Path

import numpy as np
import pytest

from document_helpers import TEXTS, corpus_of, save_reference, score_into
from slm.errors import UserError
from slm.store.document_scores import DocumentIndex, DocumentScores, open_parts, prefix_checks
from slm.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> DocumentScores:
    folder = tmp_path_factory.mktemp("store")
    corpus = corpus_of(folder, [*TEXTS, "end " * 9], tokenizer)
    return score_into(folder / "s", corpus, save_reference(folder / "m", tokenizer))


@pytest.fixture
def part(tmp_path, made) -> Path:
    import shutil

    return Path(shutil.copytree(made.folder, tmp_path / "s" / made.folder.name))


def test_checks_know_a_beginning_and_nothing_else():
    text = bytes(range(200)) * 3
    checks = prefix_checks(text)
    for length in (0, 1, 77, 600):
        np.testing.assert_array_equal(prefix_checks(text[:length]), checks[: length + 1])
    for place in (0, 50, 300):
        other = bytearray(text)
        other[place] ^= 4
        after = prefix_checks(bytes(other)) == checks
        assert after[: place + 1].all()
        assert after[place + 1 :].mean() < 0.03  # 1 of 256 by chance
    assert (np.bincount(checks, minlength=256) < 15).all()
    for value in range(256):  # a linear hash would agree nearly everywhere for some of them
        other = prefix_checks(bytes([value]) + text[1:])[1:] == checks[1:]
        assert value == text[0] or other.mean() < 0.03


def test_documents_are_found_by_their_hashes(made):
    index = DocumentIndex([made])
    assert len(index) >= len(TEXTS)
    for column in ("texts", "ids"):
        keys = index.keys(column)
        np.testing.assert_array_equal(index.find(column, keys), np.arange(len(index)))
        np.testing.assert_array_equal(index.find(column, keys[:0]), [])
        assert index.find(column, np.array([b"\x00" * 32, b"\xff" * 32], "S32")).tolist() == [
            -1,
            -1,
        ]
    import hashlib

    texts = np.array([hashlib.sha256(text.encode()).digest() for text in TEXTS], "S32")
    np.testing.assert_array_equal(index.find("texts", texts), np.arange(len(TEXTS)))


def test_a_hash_that_begins_as_another_is_another(made):
    index, rng = DocumentIndex([made]), np.random.default_rng(0)
    rows = rng.integers(1, 256, (3 * len(index), 32), dtype=np.uint8)
    rows[:, :8] = rows[::3, :8].repeat(3, axis=0)  # each three begin alike
    keys = rows.view("S32").ravel()
    index.keys = lambda column: keys[::3]  # type: ignore[method-assign]
    expected = np.where(np.arange(len(keys)) % 3, -1, np.arange(len(keys)) // 3)
    np.testing.assert_array_equal(index.find("ids", keys), expected)
    index.keys = lambda column: keys[: len(index)]  # type: ignore[method-assign]
    del index.order
    expected = np.where(np.arange(len(keys)) < len(index), np.arange(len(keys)), -1)
    np.testing.assert_array_equal(index.find("ids", keys), expected)


def test_beginnings_are_found(made):
    index = DocumentIndex([made])
    for number, text in enumerate(TEXTS):
        data = text.encode()
        if len(data) > 60:
            assert index.find_beginning(data[:50], None) == number
            assert index.find_beginning(data[:49] + b"\x00", None) in (-1, number)
            assert index.find_beginning(b"#" + data[1:50], None) == -1
    assert index.find_beginning(b"", None) == -1
    assert DocumentIndex([]).find_beginning(b"text of no store", None) == -1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("column", ["documents", "texts", "ids", "logprobs", "bytes", "checks"])
def test_a_flipped_byte_is_found(part, column):
    flip(part / f"{column}-00001.npy")
    with pytest.raises(UserError, match=f"{column}-00001.npy is damaged: sha256"):
        open_parts([str(part.parent)], "full")
    assert [whole for _, whole, _ in verify(part.parent)] == [False]


def test_what_is_not_whole_is_refused(part):
    manifest = json.loads((part / "manifest.json").read_text())
    (part / "manifest.json").write_text(json.dumps(manifest | {"model_sha256": "other"}))
    with pytest.raises(UserError, match="does not match its fingerprint"):
        open_parts([str(part.parent)])
    (part / "manifest.json").write_text(json.dumps(manifest | {"scoring": None}))
    with pytest.raises(UserError, match="scoring is null, expected an object"):
        open_parts([str(part.parent)])
    (part / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no scores of documents"):
        open_parts([str(part.parent)])


@pytest.mark.parametrize(
    ("column", "place", "value", "sentence"),
    [
        ("logprobs", 3, 0.5, "entry 3 has log-prob 0.5, a finite number <= 0"),
        ("documents", (1, 0), 10**6, "do not follow one another"),
        ("documents", (0, 1), 1, "document 0 has 1 bytes, its tokens have"),
    ],
)
def test_values_that_cannot_be(made, monkeypatch, column, place, value, sentence):
    own = DocumentScores.column

    def changed(self, name, index):
        found = np.array(own(self, name, index))
        if name == column:
            found[place] = value
        return found

    monkeypatch.setattr(DocumentScores, "column", changed)
    with pytest.raises(UserError, match=sentence):
        made.check_documents(0)
