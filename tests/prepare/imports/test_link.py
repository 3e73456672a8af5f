"""A linked corpus is the copied one, except that its tokens are not in it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm.errors import UserError
from slm.prepare.imports.command import import_corpus
from slm.store.shards import Corpus
from slm.store.windows import Windows
from slm.train.export import export_corpus
from slm.verify import verify_part

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "token_files"
CASES = [
    ("megatron", "megatron/whole", {}),
    ("megatron", "megatron/wide.idx", {}),
    ("megatron", "megatron/sentences", {}),
    ("datatrove", "datatrove/plain_00000_unshuffled.ds", {}),
    ("datatrove", "datatrove/masked_00000_unshuffled.ds", {"packing": "documents"}),
    ("litdata", "litdata/arrays", {}),
    ("llmc", "llmc/llama3.bin", {}),
    ("llmc", "llmc/gpt2.bin", {}),
    ("olmo", "olmo/tokens-0.npy", {"masks": f"{FILES}/olmo/labels-0.npy"}),
]


@pytest.fixture
def run(tmp_path, bytes_folder) -> Callable[..., Corpus]:
    """run(format, path, link, **settings): of a copy of the files."""

    def go(format: str, path: Any, link: bool, **settings: Any) -> Corpus:
        small: dict[str, Any] = {"tokenizer": {"path": bytes_folder}, "seq_len": 4} | settings
        return import_corpus(format, path, tmp_path / f"{link}", link=link, **small)

    return go


def column(corpus: Corpus, name: str) -> list[list[Any]]:
    return [np.asarray(corpus.column(name, s.index)).tolist() for s in corpus.shards]


@pytest.mark.parametrize(("format", "path", "settings"), CASES)
@pytest.mark.parametrize("shard_tokens", [5, 9, 14, 100])
def test_columns_are_those_of_the_copy(run, format, path, settings, shard_tokens):
    """Of one file, which both cut alike."""
    found = [
        run(format, FILES / path, i, shard_tokens=shard_tokens, **settings) for i in (False, True)
    ]
    names = ["tokens", "documents", "bytes", *(["masks"] if found[0].has_masks else [])]
    for name in names:
        assert column(found[1], name) == column(found[0], name), name
    assert not list((found[1].folder).glob("tokens-*.npy"))
    assert found[1].has_masks == found[0].has_masks
    copied, linked = (Windows(corpus) for corpus in found)
    every = np.arange(len(copied))
    ours, theirs = linked.batch(every), copied.batch(every)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(linked.target_bytes(every), copied.target_bytes(every))
    reports = [json.loads((c.folder.parent / "report.json").read_text()) for c in found]
    for key in ("documents", "tokens", "dropped_tail_tokens", "windows", "shards"):
        assert reports[0]["train"][key] == reports[1]["train"][key], key
    assert "whole" not in verify_part(found[1].folder, lambda count: None)


def test_a_document_goes_on_behind_the_tail_that_a_file_drops(run, tmp_path):
    """EOS is 0. Windows of 4: file a has 13 + 2 tokens, b 3, c 9."""
    a, b, c = ([5, 0, 6] + [7] * 12, [7, 7, 0], [8] * 8 + [0])
    paths = []
    for name, ids in (("a", a), ("b", b), ("c", c)):
        np.save(tmp_path / f"{name}.npy", np.array(ids, np.uint16))
        paths.append(tmp_path / f"{name}.npy")
    corpus = run("npy", str(tmp_path / "[abc].npy"), True, shard_tokens=9)
    assert column(corpus, "tokens") == [a[:9], a[9:14], c]
    assert column(corpus, "documents") == [
        [[0, 0, 0, 0], [2, 0, 1, 0]],
        [[-7, 0, 1, 7]],
        [[0, 0, 2, 0]],
    ]
    report = json.loads((corpus.folder.parent / "report.json").read_text())
    assert report["train"]["dropped_tail_tokens"] == 1 + len(b)
    shutil.rmtree(tmp_path / "True")
    np.save(tmp_path / "b.npy", np.array([7, 7, 7], np.uint16))
    corpus = run("npy", str(tmp_path / "[abc].npy"), True, shard_tokens=9)
    assert column(corpus, "documents")[2] == [[-16, 0, 1, 16]]  # 13 in a, 3 in b


def test_the_fingerprint_is_of_the_tokens_and_not_of_their_place(run, tmp_path):
    found = set()
    for name, last in (("one", 3), ("two", 3), ("three", 4)):
        np.array([5, 6, 7, 0, 1, last], np.uint16).tofile(tmp_path / f"{name}.bin")
        shutil.rmtree(tmp_path / "True", ignore_errors=True)
        (tmp_path / "train.bin").unlink(missing_ok=True)
        (tmp_path / f"{name}.bin").rename(tmp_path / "train.bin")
        if name == "two":
            (tmp_path / "else").mkdir()
            (tmp_path / "train.bin").rename(tmp_path / "else" / "train.bin")
        where = tmp_path / "else" if name == "two" else tmp_path
        found.add(run("nanogpt", where / "train.bin", True, seq_len=5).fingerprint)
    assert len(found) == 2


def test_what_cannot_be_linked_is_refused_and_nothing_is_left(run, tmp_path):
    with pytest.raises(UserError, match="typed.*: its uint16 are no plain numbers in a file"):
        run("mds", FILES / "mds" / "typed", True)
    np.save(tmp_path / "big.npy", np.arange(9, dtype=">i4"))
    with pytest.raises(UserError, match="big.npy: its int32 are no plain numbers in a file"):
        run("npy", tmp_path / "big.npy", True)
    with pytest.raises(UserError, match="link=true leaves files as they are, and add_eos=true"):
        run("megatron", FILES / "megatron" / "no_eod", True, add_eos=True)
    np.save(tmp_path / "wide.npy", np.array([1, 2, 3, 999, 5]))
    with pytest.raises(UserError, match="wide.npy: token 3 is 999, the tokenizer has 258 ids"):
        run("npy", tmp_path / "wide.npy", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.npy", "wide.npy"]


def test_a_file_that_changed_in_place_is_named_and_found_before_an_export(run, tmp_path):
    """Of its old size: a bad id when it is read, any other with check=full."""
    np.array([5, 6, 7, 0, 1], np.uint16).tofile(tmp_path / "train.bin")
    corpus = run("nanogpt", tmp_path / "train.bin", True)
    for ids, last in (([5, 6, 7, 0, 2], 2), ([5, 6, 7, 0, 999], 999)):
        np.array(ids, np.uint16).tofile(tmp_path / "train.bin")
        with pytest.raises(UserError, match=r"train.bin is damaged or was changed: 10 bytes from"):
            export_corpus(corpus, "nanogpt", tmp_path / "out", check="full")
        assert not (tmp_path / "out").exists()
        if last == 2:
            assert Windows(corpus).tokens(np.array([0])).tolist() == [ids]
    with pytest.raises(UserError, match=r"train.bin: window 0 of .*/train holds token id 999, the"):
        Windows(Corpus.open(corpus.folder)).tokens(np.array([0]))
