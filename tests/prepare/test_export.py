"""An export has the bytes that its trainer's own library wrote, and comes back by `slm import`."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

import warm
from slm.command_keys import EXPORTS
from slm.errors import UserError
from slm.prepare import export_rows
from slm.prepare.command import prepare
from slm.prepare.export import export_files
from slm.prepare.export_rows import document_ends
from slm.prepare.imports import mds
from slm.prepare.imports.command import import_corpus
from slm.store.shards import Corpus
from text_helpers import write_records

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
    out = export_files(corpus, "megatron", tmp_path / "out")
    for suffix in (".bin", ".idx"):
        expected = (FILES / "megatron" / f"whole{suffix}").read_bytes()
        assert (out / f"train{suffix}").read_bytes() == expected


def test_llmc_reads_what_it_would_have_written(imported, tmp_path):
    corpus = imported("llmc", "llmc/llama3.bin")
    out = export_files(corpus, "llmc", tmp_path / "out")
    assert (out / "train_000000.bin").read_bytes() == (FILES / "llmc/gpt2.bin").read_bytes()


def test_olmo_reads_what_it_would_have_written(imported, tmp_path):
    corpus = imported("olmo", "olmo/tokens-*.npy", masks=f"{FILES}/olmo/labels-*.npy")
    out = export_files(corpus, "olmo", tmp_path / "out")
    for ours, theirs in (("part", "tokens"), ("label_mask", "labels")):
        parts = [(FILES / "olmo" / f"{theirs}-{number}.npy").read_bytes() for number in (0, 1)]
        assert (out / f"{ours}-00000.npy").read_bytes() == b"".join(parts)
    lines = gzip.decompress((out / "part-00000.csv.gz").read_bytes()).decode().split()
    ends = np.cumsum(LENGTHS).tolist()
    assert lines == [f"{begin},{end}" for begin, end in zip([0, *ends], ends, strict=False)]
    tokenizer, masks = {"path": str(out / "tokenizer")}, str(out / "label_mask-00000.npy")
    again = imported("olmo", out, "again", tokenizer=tokenizer, masks=masks)
    assert again.fingerprint == corpus.fingerprint


@pytest.mark.parametrize("format", EXPORTS)
def test_an_export_comes_back(imported, tmp_path, format):
    settings: dict[str, Any] = {"seq_len": 4, "shard_tokens": 9}
    corpus = imported("megatron", "megatron/whole", **settings)
    out = export_files(corpus, format, tmp_path / "out")
    settings |= {"tokenizer": {"path": str(out / "tokenizer")}, "documents": "eos"}
    again = imported(format, out, "again", **settings)
    assert again.fingerprint == corpus.fingerprint
    for index in range(len(corpus.shards)):
        ours, theirs = (one.column("documents", index).tolist() for one in (corpus, again))
        assert ours == theirs


@pytest.fixture
def masked(imported) -> Callable[[str], Corpus]:
    """masked(packing): in shards of 9 tokens, so that documents and blocks lie in several."""

    def go(packing: str) -> Corpus:
        settings = {"seq_len": 4, "shard_tokens": 9, "packing": packing}
        corpus = imported(
            "olmo", "olmo/tokens-*.npy", masks=f"{FILES}/olmo/labels-*.npy", **settings
        )
        assert len(corpus.shards) > 3
        return corpus

    return go


def whole(corpus: Corpus, name: str) -> list[Any]:
    return np.concatenate([corpus.column(name, s.index) for s in corpus.shards]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["datatrove", "mds", "litdata", "megatron", "olmo"])
def test_its_own_library_reads_an_export(imported, tmp_path, format):
    labels = f"{FILES}/olmo/labels-*.npy"
    corpus = imported("olmo", "olmo/tokens-*.npy", masks=labels, packing="documents")
    out = export_files(corpus, format, tmp_path / "out")
    script = str(Path(__file__).with_name("readers.py"))
    done = warm.run([sys.executable, script, format, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    stream, mask = whole(corpus, "tokens"), whole(corpus, "masks")
    expected: dict[str, Any] = {"tokens": DOCUMENTS}
    if format in ("datatrove", "olmo"):
        expected = {"tokens": [stream]}
    if format == "litdata":
        expected = {"tokens": [stream[first : first + 8] for first in range(0, len(stream), 8)]}
    if format == "datatrove":
        expected["positions"] = [[place for n in LENGTHS for place in range(n)]]
    if format == "olmo":
        expected["mask"] = [mask]
    if format == "mds":
        expected["mask"] = [part.tolist() for part in np.split(mask, np.cumsum(LENGTHS)[:-1])]
    assert found == expected


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_datasets_reads_an_export(masked, tmp_path, packing):
    corpus = masked(packing)
    out = export_files(corpus, "datasets", tmp_path / "out")
    table = Dataset.from_parquet(str(out / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    rows: Any = table.to_dict()
    stream, masks = whole(corpus, "tokens"), whole(corpus, "masks")
    assert sum(rows["input_ids"], []) == stream
    expected = [token if live else -100 for token, live in zip(stream, masks, strict=True)]
    assert sum(rows["labels"], []) == expected
    sizes = [len(row) for row in rows["input_ids"]]
    if packing == "documents":
        assert sizes == [*LENGTHS[:-1], len(stream) - sum(LENGTHS[:-1])]
    else:
        assert sizes == [4] * (len(stream) // 4) + [len(stream) % 4] * (len(stream) % 4 > 0)


@pytest.mark.parametrize("format", ["datatrove", "mds", "olmo", "datasets"])
@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_masks_come_back(masked, imported, tmp_path, format, packing):
    corpus = masked(packing)
    out = export_files(corpus, format, tmp_path / "out")
    settings = {"seq_len": 4, "shard_tokens": 9, "packing": packing, "documents": "eos"}
    if format in ("mds", "olmo"):
        settings["masks"] = "mask" if format == "mds" else str(out / "label_mask-*.npy")
    again = imported(format, out, "again", tokenizer={"path": str(out / "tokenizer")}, **settings)
    assert again.fingerprint == corpus.fingerprint


def test_rows_go_into_several_files(imported, tmp_path, monkeypatch):
    monkeypatch.setattr(export_rows, "CHUNK_BYTES", 16)
    corpus = imported("megatron", "megatron/whole", packing="documents")
    for format, pattern in (("mds", "*.mds"), ("litdata", "*.bin")):
        out = export_files(corpus, format, tmp_path / format)
        assert len(list(out.glob(pattern))) == 3
        again = imported(format, out, f"again {format}", packing="documents")
        assert again.fingerprint == corpus.fingerprint


def test_what_does_not_fit_is_said(imported, tmp_path, caplog):
    corpus = imported("datatrove", "datatrove/masked_00000_unshuffled.ds", packing="documents")
    export_files(corpus, "llmc", tmp_path / "out")
    assert "format=llmc has no place for its masks, they are left out" in caplog.text
    assert "format=llmc knows documents by their EOS alone" in caplog.text
    with pytest.raises(UserError, match=f"out={tmp_path}/out exists"):
        export_files(corpus, "llmc", tmp_path / "out")
    with pytest.raises(UserError, match="no is not a finished corpus: it does not exist"):
        export_files("no", "llmc", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_weights_are_a_column_where_the_format_has_one(
    imported, tmp_path, bytes_folder, packing, caplog
):
    records = [{"text": "one two", "w": 0.5}, {"text": "three", "w": 0}, {"text": "four", "w": 2}]
    path = write_records(tmp_path / "a.jsonl", *records * 3)
    corpus = prepare(
        [{"path": str(path), "token_weight": "w"}],
        tmp_path / "corpus",
        tokenizer={"path": bytes_folder},
        **{"seq_len": 4, "shard_tokens": 9, "packing": packing, "heldout_ratio": 0, "num_proc": 1},
    ).train
    assert corpus is not None and len(corpus.shards) > 3
    weights, stream = whole(corpus, "weights"), whole(corpus, "tokens")
    assert {0, 0.5, 2} == set(weights)
    rows = pq.read_table(export_files(corpus, "datasets", tmp_path / "rows") / "train.parquet")
    assert sum(rows["token_weight"].to_pylist(), []) == weights
    sizes = [len(ids) for ids in rows["input_ids"].to_pylist()]
    assert [len(row) for row in rows["token_weight"].to_pylist()] == sizes
    out = export_files(corpus, "mds", tmp_path / "mds")
    shards = json.loads((out / "index.json").read_text())["shards"]
    assert shards[0]["column_names"] == [*["mask"] * corpus.has_masks, "token_weight", "tokens"]
    found: dict[str, list[Any]] = {"tokens": [], "token_weight": []}
    for shard in shards:
        data = np.fromfile(out / shard["raw_data"]["basename"], np.uint8)
        for sample in mds.split(out, data, shard["samples"]):
            for name, kind in (("tokens", "uint16"), ("token_weight", "float32")):
                names = shard["column_names"]
                found[name] += mds_column(sample, names.index(name), len(names), kind)
    assert found == {"tokens": stream, "token_weight": weights}
    settings = {"seq_len": 4, "shard_tokens": 9, "packing": packing, "documents": "eos"}
    for format, folder in (("mds", out), ("datasets", tmp_path / "rows")):
        again = imported(format, folder, f"again {format}", **settings)
        assert again.fingerprint == corpus.fingerprint and whole(again, "weights") == weights
    assert "left out" not in caplog.text
    export_files(corpus, "olmo", tmp_path / "olmo")
    assert "format=olmo has no place for its weights, they are left out" in caplog.text


def test_weights_of_rows_are_checked(imported, tmp_path):
    for row, sentence in [
        ([1.0, -2.0, 1.0], "rows.parquet, row 0: token_weight of token 4 is -2.0, a finite number"),
        ([1.0, 2.0], r"row 1: token_weight has 2 entries, input_ids has 3"),
        ([1.0, None, 1.0], "token_weight of token 4 is nan, a finite number of at least 0"),
    ]:
        columns = {"input_ids": [[5, 6, 0], [7, 8, 0]], "token_weight": [[1.0] * 3, row]}
        pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=sentence):
            imported("datasets", tmp_path / "rows.parquet")
    pq.write_table(pa.table({"input_ids": [[5.0, 0.5]]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="column input_ids holds double"):
        imported("datasets", tmp_path / "rows.parquet")


def test_mds_weights_of_any_type_and_an_eos_that_is_added(imported, tmp_path):
    """Which weighs what the token before it does. Tokens that are no whole numbers are refused."""
    (tmp_path / "in").mkdir()
    samples, expected = [([5, 6], [0.5, 3]), ([7, 0], [1, 2])], [0.5, 3, 3, 1, 2]
    for kind, code in (("float64", 66), ("int8", 9), ("float16", 18)):
        write_mds(tmp_path / "in", samples, kind, code)
        corpus = imported("mds", tmp_path / "in", f"of {kind}", add_eos=True)
        assert whole(corpus, "weights") == [int(w) if kind == "int8" else w for w in expected]
        assert whole(corpus, "tokens") == [5, 6, 0, 7, 0]
    with pytest.raises(UserError, match="its tokens are float16, no whole numbers"):
        imported("mds", tmp_path / "in", column="token_weight")


def write_mds(folder, samples, kind, code) -> None:
    """As MDSWriter does, by hand: two columns, one axis each, of a length in one byte."""
    packed = []
    for tokens, weights in samples:
        values = [
            bytes([33, 4, len(tokens)]) + np.array(tokens, "<i4").tobytes(),
            bytes([code, 4, len(weights)]) + np.array(weights, kind).tobytes(),
        ]
        packed.append(np.array([*map(len, values)], "<u4").tobytes() + b"".join(values))
    start = export_rows.packed(len(packed), [len(sample) for sample in packed])
    (folder / "shard.mds").write_bytes(start + b"".join(packed))
    shard = {"column_names": ["tokens", "token_weight"], "column_encodings": ["ndarray"] * 2}
    shard |= {"column_sizes": [None, None], "compression": None, "format": "mds", "zip_data": None}
    shard |= {"raw_data": {"basename": "shard.mds"}, "samples": len(packed)}
    (folder / "index.json").write_text(json.dumps({"shards": [shard]}))


def mds_column(sample: np.ndarray, at: int, count: int, kind: str) -> list[Any]:
    """One of `count` columns: their sizes come first, of each its axes and a length of one byte."""
    sizes = sample[: 4 * count].view("<u4").tolist()
    begin = 4 * count + sum(sizes[:at])
    return sample[begin + 2 : begin + sizes[at]].view(kind).tolist()
