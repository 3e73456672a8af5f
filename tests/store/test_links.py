"""Columns that lie in the files of another trainer."""

import hashlib

import numpy as np
import pytest

from slm.errors import UserError
from slm.prepare.imports.command import import_corpus
from slm.store.links import TokenBytes, hash_slice
from slm.store.shards import Corpus
from slm.verify import verify_part


def test_bytes_are_looked_up_by_token():
    sizes = TokenBytes(np.array([0, 3, 1], np.uint8), np.array([2, 1, 1, 0], np.int32))
    assert (len(sizes), sizes[1:3].tolist(), sizes[[0, 3]].tolist()) == (4, [3, 3], [1, 0])
    assert np.asarray(sizes).tolist() == [1, 3, 3, 0] and np.asarray(sizes).dtype == np.uint8


def test_the_hash_of_a_slice_is_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("slm.store.links.BLOCK", 7)
    data = bytes(range(100))
    (tmp_path / "f").write_bytes(data)
    seen: list[int] = []
    found = hash_slice(tmp_path / "f", 11, 30, seen.append)
    assert found == hashlib.sha256(data[11:41]).hexdigest() and sum(seen) == 30


def test_files_that_changed_are_found(bytes_folder, tmp_path):
    path = tmp_path / "train.bin"
    ids = np.array([5, 6, 7, 0, 1, 3, 9, 9, 9], np.uint16)
    ids.tofile(path)
    options = {"tokenizer": {"path": bytes_folder}, "seq_len": 4, "link": True}
    folder = import_corpus("nanogpt", path, tmp_path / "out", **options).folder
    assert verify_part(folder, lambda count: None)
    Corpus.open(folder, check="full")
    ids[2] = 8
    ids.tofile(path)
    Corpus.open(folder)  # sizes alone
    with pytest.raises(UserError, match=f"^{path} is damaged or was changed: 18 bytes from 0 on"):
        Corpus.open(folder, check="full")
    with pytest.raises(UserError, match="is damaged or was changed"):
        verify_part(folder, lambda count: None)
    ids[:-1].tofile(path)
    with pytest.raises(UserError, match=f"^{path} has 16 bytes, it had 18 when {folder} was made"):
        Corpus.open(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"^{path} is missing: {folder} .link=true. has its tokens"):
        Corpus.open(folder)
