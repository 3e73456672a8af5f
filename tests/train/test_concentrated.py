"""Texts come back byte for byte, spans through `slm prepare`, rows as windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from slm.errors import UserError
from slm.prepare.command import prepare
from slm.prepare.export_rows import lengths
from slm.store.documents import Documents
from slm.store.shards import Corpus
from slm.store.windows import IGNORE_INDEX, Windows
from slm.train.concentrated import (
    kept_characters,
    read,
    spans,
    texts_of,
    write_rows,
    write_texts,
)
from slm.train.kept import CANDIDATE, KEPT, Kept, documents_of, first_targets
from text_helpers import write_records

TEXTS = ["a\u00e9\u4e2d\U0001f600z", "\U0001f600", " x \n\ty", "e\u0301\u6771\u4eac \u00a3", "end"]


@pytest.fixture(params=["bytes", "merges"])
def corpus(request, tmp_path, bytes_folder, tokenizer) -> Corpus:
    """Documents of which some lie in several shards, and whose characters tokens may cut."""
    tokenizer.save_pretrained(tmp_path / "merges")
    folder = {"bytes": bytes_folder, "merges": str(tmp_path / "merges")}[request.param]
    return prepared(tmp_path / "corpus", [{"text": text} for text in TEXTS], folder)


def prepared(out: Path, records: list[Any], tokenizer: str, **source: Any) -> Corpus:
    path = write_records(out.with_suffix(".jsonl"), *records)
    settings: dict[str, Any] = {"seq_len": 1, "shard_tokens": 9, "heldout_ratio": 0, "num_proc": 1}
    made = prepare([{"path": str(path)} | source], out, tokenizer={"path": tokenizer}, **settings)
    assert made.train is not None
    return made.train


def random_state(corpus: Corpus, share: float = 0.5) -> Kept:
    generator = np.random.Generator(np.random.PCG64(1))
    drawn = generator.random(sum(lengths(corpus))) < share
    return Kept(np.where(drawn, KEPT, CANDIDATE).astype(np.uint8), None)


def written(corpus: Corpus, kept: Kept, folder: Path, has_spans: bool) -> list[dict[str, Any]]:
    found = documents_of(corpus, kept)
    folder.mkdir()
    write_texts(corpus, kept, found, np.ones(len(found.ends), bool), folder, has_spans)
    name = "spans" if has_spans else "documents"
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_with_all_tokens_kept_the_text_comes_back_byte_for_byte(tmp_path, corpus):
    assert len(corpus.shards) > 2
    every = random_state(corpus, share=1.0)
    documents = written(corpus, every, tmp_path / "d", False)
    assert [record["text"] for record in documents] == TEXTS
    assert [(r["source"], r["record"], r["share"]) for r in documents] == [
        ("corpus", i, 1.0) for i in range(len(TEXTS))
    ]
    for record in written(corpus, every, tmp_path / "s", True):
        assert "".join(record["text"][a:b] for a, b in record["signal"]) == record["text"]
        assert record["mask"] == []


def test_spans_go_through_prepare(tmp_path, corpus):
    """A token is a target again where it was kept, or shares a character with one that was."""
    kept = random_state(corpus)
    records = written(corpus, kept, tmp_path / "s", True)
    tokenizer = str(corpus.tokenizer_folder)
    again = prepared(tmp_path / "again", records, tokenizer, mask="mask", signal="signal")
    columns = {
        name: np.concatenate([again.column(name, i) for i in range(len(again.shards))])
        for name in ("tokens", "masks", "signal")
    }
    documents = Documents(corpus)
    for number, text in enumerate(TEXTS):
        begin, end = documents.bounds[number : number + 2]
        assert columns["tokens"][begin:end].tolist() == documents.tokens(number).tolist()
        owner = [i for i, char in enumerate(text) for _ in char.encode()]  # of each byte
        sizes, expected = documents.column("bytes", number).tolist(), []
        mine = [owner[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        whole = {c for i, of in enumerate(mine) if kept.state[begin + i] == KEPT for c in of}
        for of in mine[:-1]:
            expected.append(2 * sum(c in whole for c in of) > len(of))
        assert columns["masks"][begin:end].tolist() == [*expected, expected[-1]]  # EOS as the last
        assert (columns["signal"][begin : end - 1] == 1).tolist() == expected
        assert all(e for i, e in enumerate(expected) if kept.state[begin + i] == KEPT)


def test_a_character_that_tokens_share_was_kept_if_one_of_them_was():
    sizes, kept = np.array([1, 2, 1, 1, 0]), np.array([False, True, False, True, True])
    found = kept_characters("\u4e2dab", sizes, kept)  # 3 bytes in tokens of 1 and 2
    assert found.tolist() == [True, False, True]
    assert spans(found) == [[0, 1], [2, 3]] and spans(~found) == [[1, 2]]
    assert spans(np.zeros(3, bool)) == []


def test_a_corpus_that_ends_within_a_character(tmp_path, bytes_folder):
    """3 windows of 4 tokens of a byte: of the last text's emoji 3 of its 4 bytes are there."""
    path = write_records(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "def\u4e2d\U0001f600g"})
    made = prepare(
        [str(path)], tmp_path / "c", tokenizer={"path": bytes_folder}, seq_len=4, heldout_ratio=0,
        num_proc=1,
    )  # fmt: skip
    assert made.train is not None and sum(lengths(made.train)) == 13
    kept = random_state(made.train, share=1.0)
    found = written(made.train, kept, tmp_path / "d", True)
    assert [record["text"] for record in found] == ["abc", "def\u4e2d"]
    assert [record["signal"] for record in found] == [[[0, 3]], [[0, 4]]]


def test_text_that_tokens_do_not_spell_is_refused(tmp_path, bytes_folder):
    corpus = prepared(tmp_path / "c", [{"text": "abc"}], bytes_folder)
    texts = texts_of(corpus)
    texts.pieces[int(corpus.column("tokens", 0)[1])] = b"\xff"
    with pytest.raises(UserError, match="document 0 .record 0 of c. is no UTF-8"):
        read(texts, 0)


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_rows_are_windows_with_what_was_kept(tmp_path, make_corpus, packing):
    shards = [np.arange(0, 13), np.arange(100, 109)]
    weights = [[float(t % 3) for t in tokens] for tokens in shards]
    starts = [[0, 3, 8], [0, 4]]
    corpus = make_corpus(tmp_path / "c", shards, 4, packing, starts, weights=weights)
    kept, windows = random_state(corpus), Windows(corpus)
    write_rows(windows, kept, tmp_path)
    rows = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    assert rows["input_ids"] == [[*range(s, s + 5)] for s in (0, 4, 8, 100, 104)]
    for row, place in enumerate(first_targets(corpus)):
        live = kept.state[place : place + 4] == KEPT
        ids = rows["input_ids"][row][1:]
        expected = [i if k else IGNORE_INDEX for i, k in zip(ids, live, strict=True)]
        assert rows["labels"][row] == [IGNORE_INDEX, *expected]
        assert rows["token_weight"][row][1:] == [i % 3 for i in ids]
    if packing == "documents":
        assert rows["seq_lengths"] == [[3, 2], [4, 1], [5], [4, 1], [5]]
    else:
        assert "seq_lengths" not in rows
