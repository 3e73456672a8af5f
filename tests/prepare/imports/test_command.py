"""Files that the formats' own libraries wrote -> the same tokens and documents; refusals."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from slm.errors import UserError
from slm.prepare.command import prepare
from slm.prepare.imports.command import import_corpus
from slm.store.shards import Corpus
from slm.store.tokenizer import load_corpus_tokenizer, train_tokenizer
from slm.verify import verify_part

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "token_files"
TEXTS = ["one two", "a longer text: three", "x", "the last"]
DOCUMENTS = [  # of a tokenizer whose tokens are single bytes; EOS is 0
    [80, 79, 70, 222, 85, 88, 80, 0],
    [66, 222, 77, 80, 79, 72, 70, 83, 222, 85, 70, 89, 85, 27, 222, 85, 73, 83, 70, 70, 0],
    [89, 0],
    [85, 73, 70, 222, 77, 66, 84, 85, 0],
]
STREAM = [token for ids in DOCUMENTS for token in ids]
STARTS = [0, 8, 29, 31]
EOS_FIRST = [token for ids in DOCUMENTS for token in [0, *ids[:-1]]]


@pytest.fixture
def run(tmp_path, bytes_folder) -> Callable[..., Corpus]:
    """run(format, path, **settings) -> a corpus of windows of one target: no token is dropped."""

    def go(format: str, path: Any, **settings: Any) -> Corpus:
        small: dict[str, Any] = {"tokenizer": {"path": bytes_folder}, "seq_len": 1} | settings
        return import_corpus(format, path, tmp_path / "out", **small)

    return go


def tokens(corpus: Corpus) -> list[int]:
    """Of all shards, end to end."""
    return read(corpus, "tokens")


def read(corpus: Corpus, column: str) -> list[Any]:
    return np.concatenate([corpus.column(column, s.index) for s in corpus.shards]).tolist()


def starts(corpus: Corpus) -> list[int]:
    """Where documents begin; of one shard."""
    return corpus.column("documents", 0)[:, 0].tolist()


# ---- every format -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "path", "settings"),
    [
        ("megatron", "megatron/whole", {}),
        ("megatron", "megatron/whole.bin", {}),
        ("megatron", "megatron/wide.idx", {}),
        ("megatron", "megatron/sentences", {}),
        ("megatron", "megatron/no_eod", {"add_eos": True}),
        ("datatrove", "datatrove/plain_00000_unshuffled.ds", {}),
        ("mds", "mds/int64_bytes", {}),
        ("mds", "mds/typed", {}),
        ("mds", "mds/untyped", {"column": "ids"}),
        ("mds", "mds/packed", {}),
        ("litdata", "litdata/tensors", {}),
        ("litdata", "litdata/arrays", {}),
        ("olmo", "olmo/tokens-*.npy", {}),
    ],
)
@pytest.mark.parametrize("documents", ["index", "eos"])
def test_what_its_library_wrote_comes_back(run, format, path, settings, documents):
    corpus = run(format, str(FILES / path), documents=documents, **settings)
    if (path, documents) == ("megatron/no_eod", "eos"):
        assert tokens(corpus) == [token for token in STREAM if token] and starts(corpus) == [0]
        return
    assert tokens(corpus) == STREAM and starts(corpus) == STARTS
    assert read(corpus, "bytes") == [int(token > 1) for token in STREAM]


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_eos_of_llmc_stands_before_its_documents(run, name):
    corpus = run("llmc", str(FILES / "llmc" / f"{name}.bin"))
    assert tokens(corpus) == EOS_FIRST
    assert starts(corpus) == [0, *(start + 1 for start in STARTS)]


def test_documents_of_a_stream_go_on_in_the_next_file(run, tmp_path):
    """nanoGPT's prepare.py: numpy writes it, there is no library."""
    for number, piece in enumerate(np.split(np.array(STREAM, np.uint16), [5, 29])):
        piece.tofile(tmp_path / f"train-{number}.bin")
    corpus = run("nanogpt", str(tmp_path / "train-*.bin"))
    assert tokens(corpus) == STREAM and starts(corpus) == STARTS
    assert corpus.manifest["sources"] == ["train-*"]


@pytest.mark.parametrize(
    ("format", "key", "value", "message"),
    [
        (
            "nanogpt",
            "masks",
            "m.bin",
            "masks is 'm.bin', and format=nanogpt has no such thing: olmo",
        ),
        ("litdata", "column", "x", "column is 'x', and format=litdata has no such thing: mds has"),
        ("megatron", "dtype", "uint16", "dtype is 'uint16', and format=megatron has no such thing"),
    ],
)
def test_a_key_that_the_format_does_not_look_at_is_refused(run, format, key, value, message):
    """Or a user would believe that prompts are masked."""
    with pytest.raises(UserError, match=f"^{message}"):
        run(format, "any", **{key: value})


def test_several_paths_are_sources(run, tmp_path):
    for name, ids in (("a", STREAM[:29]), ("b", STREAM[29:-1])):
        np.save(tmp_path / f"{name}.npy", np.array(ids))
    corpus = run("npy", [tmp_path / "a.npy", tmp_path / "b.npy"])
    assert corpus.manifest["sources"] == ["a", "b"] and tokens(corpus) == STREAM[:-1]
    rows = [[0, 0, 0, 0], [8, 0, 1, 0], [29, 1, 0, 0], [31, 1, 1, 0]]
    assert corpus.column("documents", 0).tolist() == rows


def test_ids_of_another_type_are_given(run, tmp_path):
    np.array(STREAM, np.uint32).tofile(tmp_path / "train.bin")
    assert tokens(run("nanogpt", tmp_path / "train.bin", dtype="uint32")) == STREAM


def test_what_olmo_lists_in_no_document_is_one(run, tmp_path):
    shutil.copy(FILES / "olmo" / "tokens-1.csv.gz", tmp_path / "a.csv.gz")
    np.array([*STREAM[29:], 7, 8], np.uint16).tofile(tmp_path / "a.npy")
    with pytest.raises(UserError, match="before token 13 ends with 8, EOS of the tokenizer is 0"):
        run("olmo", tmp_path / "a.npy")
    assert tokens(run("olmo", tmp_path / "a.npy", add_eos=True)) == [*STREAM[29:], 7, 8, 0]


def test_masks_come_along(run, tmp_path):
    corpus = run("olmo", str(FILES / "olmo" / "tokens-*.npy"), masks=f"{FILES}/olmo/labels-*.npy")
    assert read(corpus, "masks") == [token % 2 == 0 for token in STREAM]
    shutil.rmtree(tmp_path / "out")
    corpus = run("mds", FILES / "mds" / "typed", masks="mask")
    expected = [place >= 2 for ids in DOCUMENTS for place in range(len(ids))]
    assert read(corpus, "masks") == expected
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["train"]["targets"] == sum(expected)
    shutil.rmtree(tmp_path / "out")
    corpus = run("datatrove", FILES / "datatrove" / "masked_00000_unshuffled.ds")
    expected = [not 8 <= place < 12 for place in range(len(STREAM))]  # characters 0 to 4 of one
    assert (tokens(corpus), read(corpus, "masks")) == (STREAM, expected)


def test_rows_of_datasets(run, tmp_path):
    labels = [[-100, *ids[1:]] for ids in DOCUMENTS]
    Dataset.from_dict({"input_ids": DOCUMENTS, "labels": labels}).save_to_disk(tmp_path / "rows")
    corpus = run("datasets", tmp_path / "rows")
    assert tokens(corpus) == STREAM and starts(corpus) == STARTS
    assert np.flatnonzero(~np.array(read(corpus, "masks"))).tolist() == STARTS
    shutil.rmtree(tmp_path / "out")
    packed = pa.table({"input_ids": [STREAM], "seq_lengths": [[len(ids) for ids in DOCUMENTS]]})
    pyarrow.parquet.write_table(packed, tmp_path / "rows.parquet")
    corpus = run("datasets", tmp_path / "rows.parquet")
    assert tokens(corpus) == STREAM and starts(corpus) == STARTS


def test_a_corpus_of_the_same_text_is_the_same(run, tmp_path, bytes_folder):
    """datatrove tokenized the texts that `slm prepare` does here."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    settings: dict[str, Any] = {"seq_len": 4, "shard_tokens": 17}
    imported = run("datatrove", FILES / "datatrove" / "plain_00000_unshuffled.ds", **settings)
    prepared = prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "prepared",
        tokenizer={"path": bytes_folder},
        heldout_ratio=0,
        num_proc=1,
        **settings,
    )
    assert prepared.train is not None and imported.fingerprint == prepared.train.fingerprint
    ours, theirs = (
        json.loads((folder / "report.json").read_text())["train"]
        for folder in (tmp_path / "out", tmp_path / "prepared")
    )
    assert {key: ours[key] for key in theirs.keys() - {"sources"}} == {
        key: theirs[key] for key in theirs.keys() - {"sources"}
    }
    assert verify_part(tmp_path / "out", lambda count: None) == "report of an import"


@pytest.mark.parametrize(("step", "shard_tokens"), [(1, 9), (2, 100), (3, 5), (7, 9)])
@pytest.mark.parametrize(
    ("format", "path", "settings"),
    [("megatron", "no_eod", {"add_eos": True}), ("megatron", "whole", {"documents": "eos"})],
)
def test_it_does_not_depend_on_what_is_read_at_once(
    run, tmp_path, monkeypatch, step, shard_tokens, format, path, settings
):
    settings |= {"seq_len": 2, "shard_tokens": shard_tokens}
    whole = run(format, FILES / format / path, **settings)
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("slm.prepare.imports.stream.TOKENS_AT_ONCE", step)
    assert run(format, FILES / format / path, **settings).fingerprint == whole.fingerprint


def test_another_token_ends_documents(run, tmp_path, bytes_folder):
    np.array([5, 6, 3, 7, 3, 8], np.uint16).tofile(tmp_path / "train.bin")
    eos = train_tokenizer(["a"], 258).convert_ids_to_tokens(3)
    corpus = run("nanogpt", tmp_path / "train.bin", tokenizer={"path": bytes_folder, "eos": eos})
    assert corpus.manifest["eos_id"] == 3 and starts(corpus) == [0, 3, 5]
    assert load_corpus_tokenizer(corpus).eos_token_id == 3
    with pytest.raises(UserError, match="has no token 'nope', which is to be its EOS"):
        run("nanogpt", "x", tokenizer={"path": bytes_folder, "eos": "nope"})


def test_what_was_found_is_said(run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "slm.prepare")
    run("megatron", FILES / "megatron" / "no_eod", add_eos=True)
    assert "no_eod begins with 'one twoa longer text: threexthe last'" in caplog.text
    assert "no_eod: EOS was put behind 4 documents" in caplog.text
    assert f"{tmp_path / 'out' / 'train'}: 4 documents, 40 tokens" in caplog.text
    caplog.clear()
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="document that ends before token"):
        run("megatron", FILES / "megatron" / "no_eod")
    assert "begins with" not in caplog.text  # a refusal is all that is said
    np.array([5, 6, 7], np.uint16).tofile(tmp_path / "train.bin")
    run("nanogpt", tmp_path / "train.bin")
    assert "train.bin is one document: none of its tokens is EOS, 0" in caplog.text


# ---- bad input ----------------------------------------------------------------------------------


def edited(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def at(place: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + value + data[place + len(value) :]


def cut(count: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:-count]


DS, LOSS = "plain_00000_unshuffled.ds", "masked_00000_unshuffled.ds.loss"
SHARD, CHUNK = "typed/shard.00000.mds", "tensors/chunk-0-0.bin"
BAD = [
    ("megatron", "whole", "whole.idx", cut(1), "whole.idx is truncated: it has 121 bytes, 5 int64"),
    ("megatron", "whole", "whole.idx", at(0, b"IDX"), "whole.idx begins with b'IDXDIDX"),
    ("megatron", "whole", "whole.idx", at(9, b"\2"), "version is 2 and the code of its dtype 8"),
    ("megatron", "whole", "whole.idx", at(17, b"\7"), "version is 1 and the code of its dtype 7"),
    (
        "megatron",
        "whole",
        "whole.idx",
        at(58, b"\1"),
        "sequence 1 begins at byte 1 of whole.bin, 16",
    ),
    ("megatron", "whole", "whole.idx", at(82, b"\1"), r"documents span the sequences \(1, 4\)"),
    ("megatron", "whole", "whole.bin", cut(1), "whole.bin has 79 bytes, 0 of them before"),
    ("megatron", "whole", "whole.bin", cut(2), "last document ends at token 40, the file has 39"),
    ("megatron", "whole", "whole.bin", at(2, b"\2\1"), "token 1 is 258, the tokenizer has 258 ids"),
    ("megatron", "no_eod", "", None, "before token 7 ends with 80, EOS .* is 0: name"),
    ("megatron", "whole", "whole.bin", None, "whole.bin is missing"),
    ("datatrove", "", f"{DS}.index", cut(3), "index has 29 bytes, 0 .* no multiple of the 8"),
    ("datatrove", "", f"{DS}.index", cut(8), "ends at token 31, the file has 40"),
    ("datatrove", DS, f"{DS}.index", None, f"{DS}.index is missing"),
    ("datatrove", f"{DS}.index", "", None, "its tokens are in a file named"),
    ("datatrove", "", LOSS, cut(1), "loss has 39 entries, its tokens are 40"),
    ("llmc", "gpt2.bin", "gpt2.bin", cut(2), "holds 39 tokens, its header says 40"),
    ("llmc", "gpt2.bin", "gpt2.bin", at(0, b"\0"), "begins with 20240384, llm.c's files with one"),
    ("llmc", "gpt2.bin", "gpt2.bin", lambda data: data[:99], "is truncated: it has 99 bytes, 256"),
    ("nanogpt", "../llmc/gpt2.bin", "", None, "begins with 20240520, llm.c's header: format=llmc"),
    ("npy", "../olmo/tokens-0.npy", "", None, "has no header of NumPy's .* format=olmo reads"),
    ("olmo", "tokens-0.npy", "tokens-0.csv.gz", cut(9), "tokens-0.csv.gz is damaged, or no table"),
    ("olmo", "tokens-1.npy", "tokens-1.npy", cut(2), "last document ends at token 11, .* has 10"),
    (
        "mds",
        "typed",
        SHARD,
        cut(1),
        "256 bytes and 0 samples by index.json; its header says 257 and 0",
    ),
    ("mds", "typed", "typed/shard.00001.mds", None, "shard.00001.mds is missing"),
    ("mds", "untyped", "", None, "has no column tokens or input_ids, it has ids"),
    ("mds", "packed", "packed/shard.00000.mds.zstd", cut(5), "mds.zstd cannot be read"),
    ("mds", "../litdata/tensors", "", None, "lists chunks, not shards: format=litdata reads it"),
    ("mds", "nope", "", None, "nope/index.json is missing: the path is the folder"),
    ("litdata", "../mds/typed", "", None, "lists shards, not chunks: format=mds reads it"),
    ("litdata", "tensors", CHUNK, cut(4), "token 31, the file has 30"),
    ("litdata", "tensors", CHUNK, at(0, b"\5"), "has 5 items, index.json says 3"),
    ("datasets", "nope", "", None, "nope: there is no such file, glob, or folder with"),
]


@pytest.mark.parametrize(("format", "path", "file", "change", "sentence"), BAD)
def test_bad_files_are_one_sentence_and_leave_nothing(
    run, tmp_path, format, path, file, change, sentence
):
    for folder in FILES.iterdir():
        if folder.is_dir():
            shutil.copytree(folder, tmp_path / "in" / folder.name)
    home = tmp_path / "in" / format
    if file and change is None:
        (home / file).unlink()
    elif file:
        edited(home, file, change)
    with pytest.raises(UserError, match=sentence) as refused:
        run(format, os.path.normpath(home / path))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_rows_that_are_wrong_are_named(run, tmp_path):
    for columns, sentence in [
        ({"ids": [[1]]}, "rows.parquet has no input_ids, it has ids"),
        (
            {"input_ids": [[2, 0], [999, 0]]},
            r"row 1: input_ids\[0\] is 999, the vocabulary has 258",
        ),
        (
            {"input_ids": [[2, 0]], "labels": [[3, 0]]},
            r"row 0: labels\[0\] is 3, input_ids there is 2",
        ),
        (
            {"input_ids": [[2, 0]], "attention_mask": [[1, 0]]},
            r"rows without padding",
        ),
    ]:
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=sentence):
            run("datasets", tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="rows.parquet is no whole Parquet file"):
        run("datasets", tmp_path / "rows.parquet")


def test_what_is_there_stays(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"out={tmp_path}/out exists"):
        run("megatron", FILES / "megatron" / "whole")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_too_short_or_empty(run, tmp_path):
    with pytest.raises(UserError, match=r"its 40 tokens are fewer than the 41 of one window"):
        run("megatron", FILES / "megatron" / "whole", seq_len=40)
    (tmp_path / "train.bin").touch()
    with pytest.raises(UserError, match="train.bin: there are no tokens in it"):
        run("nanogpt", tmp_path / "train.bin")
    with pytest.raises(UserError, match="plain_00000_unshuffled.ds has no masks, others have"):
        run("datatrove", FILES / "datatrove")
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]
