"""An export has the bytes that its trainer's own library wrote, and comes back by `slm import`."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.errors import UserError
from slm.prepare.export import document_ends, export_corpus
from slm.prepare.imports.command import import_corpus
from slm.store.shards import Corpus

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "token_files"
DOCUMENTS = json.loads((FILES / "documents.json").read_text())
LENGTHS = [len(ids) for ids in DOCUMENTS]


@pytest.fixture
def imported(tmp_path, bytes_folder):
    """imported(format, path of a fixture, **settings): no token is dropped at its end."""

    def go(format: str, path: str | Path, out: str = "corpus", **settings: Any) -> Corpus:
        given: dict[str, Any] = {"tokenizer": {"path": bytes_folder}, "seq_len": 1} | settings
        return import_corpus(format, FILES / path, tmp_path / out, **given)

    return go


@pytest.mark.parametrize("shard_tokens", [7, 100])
def test_megatron_reads_what_it_would_have_written(imported, tmp_path, shard_tokens):
    corpus = imported("megatron", "megatron/sentences", shard_tokens=shard_tokens)
    assert document_ends(corpus).tolist() == np.cumsum(LENGTHS).tolist()
    out = export_corpus(corpus, "megatron", tmp_path / "out")
    for suffix in (".bin", ".idx"):
        expected = (FILES / "megatron" / f"whole{suffix}").read_bytes()
        assert (out / f"train{suffix}").read_bytes() == expected


def test_llmc_reads_what_it_would_have_written(imported, tmp_path):
    corpus = imported("llmc", "llmc/llama3.bin")
    out = export_corpus(corpus, "llmc", tmp_path / "out")
    assert (out / "train_000000.bin").read_bytes() == (FILES / "llmc/gpt2.bin").read_bytes()


def test_olmo_reads_what_it_would_have_written(imported, tmp_path):
    corpus = imported("olmo", "olmo/tokens-*.npy", masks=f"{FILES}/olmo/labels-*.npy")
    out = export_corpus(corpus, "olmo", tmp_path / "out")
    for ours, theirs in (("part", "tokens"), ("label_mask", "labels")):
        parts = [(FILES / "olmo" / f"{theirs}-{number}.npy").read_bytes() for number in (0, 1)]
        assert (out / f"{ours}-00000.npy").read_bytes() == b"".join(parts)
    lines = gzip.decompress((out / "part-00000.csv.gz").read_bytes()).decode().split()
    ends = np.cumsum(LENGTHS).tolist()
    assert lines == [f"{begin},{end}" for begin, end in zip([0, *ends], ends, strict=False)]
    tokenizer, masks = {"path": str(out / "tokenizer")}, str(out / "label_mask-00000.npy")
    again = imported("olmo", out, "again", tokenizer=tokenizer, masks=masks)
    assert again.fingerprint == corpus.fingerprint


@pytest.mark.parametrize("format", ["nanogpt", "llmc", "megatron", "olmo"])
def test_an_export_comes_back(imported, tmp_path, format):
    settings: dict[str, Any] = {"seq_len": 4, "shard_tokens": 9}
    corpus = imported("megatron", "megatron/whole", **settings)
    out = export_corpus(corpus, format, tmp_path / "out")
    settings |= {"tokenizer": {"path": str(out / "tokenizer")}, "documents": "eos"}
    again = imported(format, out, "again", **settings)
    assert again.fingerprint == corpus.fingerprint
    for index in range(len(corpus.shards)):
        ours, theirs = (one.column("documents", index).tolist() for one in (corpus, again))
        assert ours == theirs


def test_what_does_not_fit_is_said(imported, tmp_path, caplog):
    corpus = imported("datatrove", "datatrove/masked_00000_unshuffled.ds", packing="documents")
    export_corpus(corpus, "llmc", tmp_path / "out")
    assert "format=llmc has no place for its masks, they are left out" in caplog.text
    assert "format=llmc knows documents by their EOS alone" in caplog.text
    with pytest.raises(UserError, match=f"out={tmp_path}/out exists"):
        export_corpus(corpus, "llmc", tmp_path / "out")
    with pytest.raises(UserError, match="no is not a finished corpus: it does not exist"):
        export_corpus("no", "llmc", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]
