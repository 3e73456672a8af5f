"""Shards by number, whatever their count; a table that gives back what the records said."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.errors import UserError
from slm.store import files, shards
from slm.store.shards import Corpus, References, write_manifest
from slm.store.sidecars import Shard, Shards, read_sidecars, shard_path, write_sidecar
from slm.store.windows import Windows


def record(index: int, columns: dict[str, tuple[str, int]]) -> Shard:
    hashes = {name: f"{index * 16 + len(name):064x}" for name in columns}
    kinds = {name: kind for name, (kind, _) in columns.items()}
    return Shard(index, 100 + index, hashes, kinds, {n: rows for n, (_, rows) in columns.items()})


RECORDS = [
    record(0, {"tokens": ("uint16", 100), "documents": ("int64", 3)}),
    record(1, {"tokens": ("uint32", 101), "documents": ("int64", 0), "masks": ("bool", 101)}),
    record(2, {"scored": ("bool", 25)}),
]


def test_a_table_gives_back_what_its_records_said():
    records = [asdict(shard) for shard in RECORDS]
    for table in (made := Shards(Path("m"), records, 1), pickle.loads(pickle.dumps(made))):
        assert [*table] == RECORDS == [table[i] for i in range(3)] and table[-1] == RECORDS[2]
        assert table.num_tokens.tolist() == [100, 101, 102] and table.num_files == 6
        assert table.having("masks").tolist() == [1] and table.having("tokens").tolist() == [0, 1]
        assert table.names == {"tokens", "documents", "masks", "scored"}
        expected = {s.path(Path("f"), name).name for s in RECORDS for name in s.sha256}
        assert {*table.file_names()} == expected
    with pytest.raises(IndexError):
        made[3]


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    """Of text, tokens-100000 comes before tokens-99999."""
    numbers = [99_998, 99_999, 100_000, 100_001, 1_000_000]
    for number in reversed(numbers):
        write_sidecar(tmp_path, "tokens", record(number, {"tokens": ("uint16", 5)}))
    assert [shard.index for shard in read_sidecars(tmp_path, "tokens")] == numbers
    assert shard_path(tmp_path, "tokens", 100_000).name == "tokens-100000.npy"


def test_many_files_are_looked_into_when_they_are_read(text_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "EAGERLY", 5)
    assert Corpus.open(text_corpus.folder).shards.num_files == 6
    path = text_corpus.folder / "tokens-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="tokens-00001.npy is damaged or truncated"):
        Windows(Corpus.open(text_corpus.folder)).batch([39])
    path.unlink()
    with pytest.raises(UserError, match="tokens-00001.npy is missing"):
        Corpus.open(text_corpus.folder)


@pytest.fixture
def many(tmp_path, make_corpus, make_references) -> tuple[Corpus, References, list[np.ndarray]]:
    """40 shards of one to three windows, all but some with scores."""
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, 256, 4 * (i % 3 + 1) + 1) for i in range(40)]
    corpus = make_corpus(tmp_path / "c", tokens, 4)
    scores = [np.r_[np.nan, -ids[1:]] for ids in tokens]
    folder = make_references(tmp_path / "r", corpus, scores).folder
    kept = [generator.random(len(ids) // 4) < 0.6 for ids in tokens]
    for index, flags in enumerate(kept):
        if index % 5 == 0:
            flags[:] = True  # a whole shard has no file that says so
            continue
        add_column(folder, index, "scored", flags)
    write_manifest(folder, "logprobs", 40)
    return corpus, References.open(folder), kept


def add_column(folder: Path, index: int, name: str, values: np.ndarray) -> None:
    path = shard_path(folder, "logprobs", index, ".json")
    about: dict[str, Any] = json.loads(path.read_text())
    about["sha256"][name] = files.write_array(shard_path(folder, name, index), values)
    about["dtype"][name], about["rows"][name] = str(values.dtype), len(values)
    path.write_text(json.dumps(about))


def test_available_windows_are_those_with_scores(many):
    """slm.store.available: numbers without an array of them."""
    corpus, references, kept = many
    windows = Windows(corpus, [references], partial=True)
    expected = np.flatnonzero(np.concatenate(kept))
    assert windows.available[:].tolist() == expected.tolist() != [*range(corpus.num_windows)]
    assert len(windows.available) == len(expected) == references.num_scored()
    places = np.array([5, 0, len(expected) - 1, 5])
    assert windows.available[places].tolist() == expected[places].tolist()
    assert windows.available[2:7:2].tolist() == expected[2:7:2].tolist()
    assert Windows(corpus).available[:].tolist() == [*range(corpus.num_windows)]
    lacking = int(np.flatnonzero(~np.concatenate(kept))[0])
    with pytest.raises(UserError, match=f"has no scores of window {lacking}$"):
        windows.batch([expected[0], lacking])


def test_no_more_files_are_open_than_are_allowed(many, monkeypatch):
    corpus, references, _ = many
    windows = Windows(corpus, [references], partial=True)
    before = len([*Path("/proc/self/fd").iterdir()])
    windows._views.most = 8
    whole = windows.available[:]
    seen = [windows.batch([number])["input_ids"].tolist() for number in whole]
    assert len([*Path("/proc/self/fd").iterdir()]) <= before + 8
    assert [[ids] for ids in windows.batch(whole)["input_ids"].tolist()] == seen
    assert pickle.loads(pickle.dumps(windows))._views._kept == {}
