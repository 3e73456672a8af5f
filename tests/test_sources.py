"""Files and blocks: what is read in which order, and which settings are refused."""

import csv
import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm import readers
from slm.errors import UserError
from slm.readers import cut, open_stream, read_blocks
from slm.records import LINE_END, read_texts
from slm.sources import parse_sources
from text_helpers import LIMIT, source, texts, write_records

# ---- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 2**19])
@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_blocks_do_not_change_records(tmp_path, monkeypatch, block_bytes, document):
    path = tmp_path / "a.txt"
    path.write_text("a b\nc\n\n\n" + "long " * 9 + "\nx\n\n  \ny\n\nend")
    expected = texts(path, document=document)
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    assert texts(path, document=document) == expected
    with open_stream(path) as stream:
        pieces = list(cut(iter(lambda: stream.read(block_bytes), b""), LINE_END, LIMIT))
    assert b"".join(data or b"" for data, _ in pieces) == path.read_bytes()
    assert sum(lines for _, lines in pieces) == 11


@pytest.mark.parametrize("block_bytes", [16, 50, 2**19])
def test_too_long_lines_are_skipped_in_bounded_memory(tmp_path, monkeypatch, block_bytes):
    path = tmp_path / "a.txt"
    path.write_text("one\n" + "x" * 500 + "\ntwo\n" + "y" * 500)
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    too_long = "is longer than 9.53674e-05 MB (max_document_mb)"
    assert texts(path, max_bytes=100, document="line") == [
        (0, "one"),
        (1, f"a.txt, line 2 {too_long}"),
        (2, "two"),
        (3, f"a.txt, line 4 {too_long}"),
    ]
    assert texts(path, max_bytes=100) == [(0, f"a.txt {too_long}")]


def test_ten_megabytes_in_one_line(tmp_path):
    text = "0123456789" * 2**20
    path = write_records(tmp_path / "a.jsonl", {"text": text}, {"text": "b"})
    assert texts(path, max_bytes=2**24) == [(0, text), (1, "b")]


def test_records_are_numbered_through_the_files_of_a_source(tmp_path):
    (tmp_path / "b").mkdir()
    write_records(tmp_path / "a.jsonl", {"text": "1"}, {"text": "2"})
    write_records(tmp_path / "b" / "c.jsonl", {"text": "3"}, {"text": 4})
    found = texts(tmp_path)
    assert found[:3] == [(0, "1"), (1, "2"), (2, "3")]
    assert found[3][1].endswith("b/c.jsonl, line 2: field 'text' is a number, expected text")
    assert found[3][0] == 3


# ---- files --------------------------------------------------------------------------------------

ODD = "a b=1,c[2]{x}*?'.d"


def test_odd_names_and_compression(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    plain = write_records(folder / f"{ODD}.jsonl", {"text": "plain"})
    (folder / f"{ODD}.json.gz").write_bytes(gzip.compress(b'{"text": "gz"}'))
    with pa.output_stream(str(folder / f"{ODD}.ndjson.zst"), compression="zstd") as stream:
        stream.write(b'{"text": "zst"}\n')
    assert texts(plain) == [(0, "plain")]
    assert [text for _, text in texts(folder)] == ["gz", "plain", "zst"]
    assert source(plain).name == ODD
    assert source(folder / f"{ODD}.json.gz").name == ODD


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2", ".lz4"])
def test_truncated_compression_is_refused(tmp_path, suffix):
    content = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(10_000))
    path = tmp_path / f"a.jsonl{suffix}"
    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
    if suffix == ".xz":
        path.write_bytes(lzma.compress(content))
    else:
        with pa.output_stream(str(path), compression=codec[suffix]) as stream:
            stream.write(content)
    assert len(texts(path)) == 10_000
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"a\.jsonl.*([Tt]runcated|end-of-stream)"):
        texts(path)
    path.write_bytes(b"no compression at all")
    with pytest.raises(UserError, match=r"a\.jsonl.* (is truncated or damaged|cannot be read)"):
        texts(path)


def test_hidden_files_of_a_folder_are_not_read(tmp_path):
    root = tmp_path / ".cache" / "data"  # what stands above the folder may be hidden
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "b/.c.jsonl", "b/._a.jsonl"):
        write_records(root / name, {"text": name})
    assert [text for _, text in texts(root)] == ["a.jsonl"]
    assert [text for _, text in texts(root / "**" / "*.jsonl")] == ["a.jsonl"]
    assert texts(root / "b" / ".c.jsonl") == [(0, "b/.c.jsonl")]  # who names it, means it


@pytest.mark.parametrize("pattern", [".", "*.arrow"])
def test_a_saved_dataset_is_read_without_its_cache(tmp_path, pattern):
    folder = tmp_path / "saved"
    given = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    given.save_to_disk(folder, num_shards=2)
    datasets.load_from_disk(folder).map(lambda row: {"text": row["text"] * 2})
    assert len(list(folder.glob("cache-*.arrow"))) == 1
    assert texts(folder / pattern) == [(0, "a"), (1, "b"), (2, "c")]
    next(folder.glob("data-00001*")).unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00001.*, which is not there"):
        source(folder / pattern)
    (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state\.json names no _data_files: it is damaged"):
        source(folder / pattern)
    (folder / "state.json").unlink()  # as in the cache of the hub's data sets
    assert texts(folder / pattern) == [(0, "a"), (1, "b")]


def test_a_saved_dictionary_of_datasets_is_read(tmp_path):
    splits = datasets.DatasetDict()
    for name in ("test", "train"):
        splits[name] = datasets.Dataset.from_dict({"text": [name]})
    splits.save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == [(0, "test"), (1, "train")]


HARD = ['a", {"b": [1]}', "\\\\", 'x\\\\"]', "\u2028 \u2029 \x85 \f", "[{,}]\n\t", "\U0001d11e", ""]


@pytest.mark.parametrize("block_bytes", [1, 2, 5, 64, 2**19])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_that_is_no_lines(tmp_path, monkeypatch, block_bytes, indent, ascii_only):
    records = [{"text": t + ".", t: [{"x": [t, {}]}, []]} for t in HARD]
    texts_of_all = list(enumerate(record["text"] for record in records))
    written = [json.dumps(r, indent=indent, ensure_ascii=ascii_only) for r in records]
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.json"
    path.write_text("\ufeff [" + ",\r\n".join(written) + "]\n\n", encoding="utf-8")
    assert texts(path) == texts_of_all
    if indent:
        path.write_text("\n".join(written), encoding="utf-8")
        assert texts(path) == texts_of_all
        path.write_text(written[-1], encoding="utf-8")
        assert texts(path) == [(0, ".")]
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert texts(path) == texts_of_all


def test_faults_of_json_that_is_no_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '[{"text": "a"},\n {"text": 1}, 5, {"text": "b\nc"}, {"text" "d"}, {"text": "e"}]'
    )
    assert texts(path) == [
        (0, "a"),
        (1, "a.json, element 2: field 'text' is a number, expected text"),
        (2, "a.json, element 3 is a number, expected an object"),
        (3, "a.json, element 4 is broken JSON: Invalid control character at at character 13"),
        (4, "a.json, element 5 is broken JSON: Expecting ':' delimiter at character 10"),
        (5, "e"),
    ]
    path.write_text("[\n" + json.dumps({"text": "x" * 500}) + ', {"text": "b"}]')
    long = "a.json, element 1 is longer than 9.53674e-05 MB (max_document_mb)"
    assert texts(path, max_bytes=100) == [(0, long), (1, "b")]
    path.write_text('[{"text": "a"}, {"text": "b"')
    with pytest.raises(UserError, match=r"a\.json ends inside its list, it is cut off"):
        texts(path)
    path.write_text('[{"text": "a"}] {"text": "b"}')
    with pytest.raises(UserError, match=r"a\.json: its list ends, and { follows"):
        texts(path)
    path.write_text('{"text": "a\n{"text": "b"}')  # lines, the first of them cut off
    assert [fault for _, fault in texts(path)][1] == "b"


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_of_text(tmp_path, suffix, delimiter):
    rows = [["n", "text"], *([str(i), text + "."] for i, text in enumerate(HARD))]
    path = tmp_path / f"a{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    found = [(i, text + ".") for i, text in enumerate(HARD)]
    assert texts(path) == found
    assert texts(path, text="{n}")[1] == (1, "1")  # a number is text, as all that is written there
    compressed = tmp_path / f"b{suffix}.xz"
    compressed.write_bytes(lzma.compress(path.read_bytes()))
    assert texts(compressed) == found


def test_faults_of_tables_of_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"n,text\n0,a\n1,b,c\n\n2,\xff\n3,\n4,d\n")
    assert texts(path) == [
        (0, "a"),
        (1, "a.csv, row 2 has 3 fields, the first row has 2"),
        (2, "a.csv, row 3: field 'text' is not UTF-8"),
        (3, "a.csv, row 4: field 'text' is empty"),
        (4, "d"),
    ]
    missing = "a.csv, row 1: field 'body' is missing (there are: n, text)"
    assert texts(path, text="{body}")[0] == (0, missing)
    path.write_text('n,text\n0,"a\n')
    with pytest.raises(UserError, match=r"a\.csv, line 2: unexpected end of data"):
        texts(path)


def make_table(path: Path) -> Path:
    rows = {
        "text": ["one", "two", None],
        "meta": [{"tags": ["x", "y"]}, {"tags": []}, {"tags": ["z"]}],
    }
    table = pa.table(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables(tmp_path, suffix):
    path = make_table(tmp_path / f"{ODD}{suffix}")
    null = f"{ODD}{suffix}, row 3: field 'text' is null, expected text"
    assert texts(path) == [(0, "one"), (1, "two"), (2, null)]
    assert texts(path, text="{meta.tags[+]}")[::2] == [(0, "x+y"), (2, "z")]
    missing = f"{ODD}{suffix}, row 1: field 'body' is missing (there are: text, meta)"
    assert texts(path, text="{body}")[0] == (0, missing)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"cannot be read as {suffix[1:]}"):
        texts(path)


def test_tables_of_prompts_and_chats(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = {"q": ["one", "two"], "a": ["1", "2"], "other": [0, 0], "chats": [{"m": chat}] * 2}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    settings: tuple[dict[str, Any], ...] = (
        {"prompt": "{q} ", "text": "{a}"},
        {"messages": "chats.m"},
    )
    read = [texts(tmp_path / "a.parquet", **given) for given in settings]
    assert read == [[(0, "one 1"), (1, "two 2")], [(0, "q\na"), (1, "q\na")]]
    columns = []
    for given in settings:
        first = next(read_blocks([source(tmp_path / "a.parquet", **given)], LIMIT))
        assert isinstance(first.data, dict)
        columns.append(sorted(first.data))
    assert columns == [["a", "q"], ["chats"]]  # others are not read


def test_a_plan_says_what_is_masked(tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"q": "1"})
    plans = [source(path, **given).plan() for given in ({}, {"prompt": "{q}\\n"})]
    assert {"prompt", "messages", "roles"}.isdisjoint(plans[0])  # as in plans of before there were
    assert plans[1] == plans[0] | {"prompt": "{q}\n"}
    plan = source(path, messages="m").plan()
    assert plan == plans[0] | {"messages": "m", "roles": ["assistant"]}


def test_a_plan_says_what_is_labelled(tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"text": "1"})
    plan = source(path).plan()
    assert {"signal", "noise", "noise_seed"}.isdisjoint(plan)  # as in plans of before there were
    assert source(path, signal="meta.body").plan() == plan | {"signal": "meta.body"}
    assert source(path, noise=0.2).plan() == plan | {"noise": 0.2, "noise_seed": 0}
    assert source(path, noise=0, noise_seed=5).plan() == plan | {"noise": 0, "noise_seed": 5}


def test_spans_are_read_of_a_table(tmp_path):
    rows = {"text": ["abc", "def"], "meta": [{"s": [[0, 1], [2, 3]]}, {"s": []}], "other": [0, 0]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    one = source(tmp_path / "a.parquet", signal="meta.s")
    blocks = list(read_blocks([one], LIMIT))
    assert all(isinstance(b.data, dict) and sorted(b.data) == ["meta", "text"] for b in blocks)
    found = [text for block in blocks for text in read_texts(block, one, LIMIT)]
    assert [text.spans for text in found] == [((0, 1), (2, 3)), ()]


def test_hub_names_stream_through_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "q", "n": 1}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    one = source("owner/name", text="{question}", subset="main", split="test")
    (block,) = read_blocks([one], LIMIT)
    assert (block.data, block.file, one.name) == ({"question": "q"}, "owner/name", "owner/name")
    settings = {"split": "test", "revision": None, "streaming": True}
    assert asked == [(("owner/name", "main"), settings)]


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x.jsonl"}, "x.jsonl: there is no such file"),
        ({"pth": "x"}, r"sources\[0\] must have a path"),
        ({"path": "a.txt", "wieght": 2}, "unknown setting 'wieght', did you mean weight"),
        ({"path": "a.txt", "weight": "2"}, r"sources\[0\].weight must be a number, found '2'"),
        ({"path": "a.txt", "weight": 0}, "weight is 0, it must be positive"),
        ({"path": "a.txt", "text": 3}, "text must be text, found 3"),
        ({"path": "a.txt", "document": "page"}, "document is 'page', expected one of file"),
        ({"path": "a.txt", "format": "xml"}, "format is 'xml', expected one of jsonl"),
        ({"path": "a.jsonl", "document": "line"}, "document is for text files"),
        ({"path": "a.jsonl", "split": "test"}, "split and revision are for the hub"),
        ({"path": "a.jsonl", "prompt": "Q:"}, "template 'Q:' has no field"),
        ({"path": "a.jsonl", "prompt": ["{q}"]}, r"prompt must be text, found \['{q}'\]"),
        ({"path": "a.jsonl", "roles": ["user"]}, r"roles is \['user'\], and .*messages is not set"),
        ({"path": "a.jsonl", "messages": "m", "text": "{a}"}, "has both messages and text"),
        ({"path": "a.jsonl", "messages": "m", "prompt": "{a}"}, "has both messages and prompt"),
        ({"path": "a.jsonl", "messages": "m[]"}, r"messages is 'm\[\]', it must name a list"),
        (
            {"path": "a.jsonl", "messages": "m", "roles": "user"},
            "roles must be a list, found 'user'",
        ),
        ({"path": "a.jsonl", "messages": "m", "roles": []}, r"roles is \[\], expected one of"),
        (
            {"path": "a.jsonl", "messages": "m", "roles": ["asistant"]},
            "roles is 'asistant', expected one of system, developer, user, assistant, tool",
        ),
        ({"path": "a.txt", "messages": "m"}, "messages is for records, a.txt is text"),
        ({"path": "a.jsonl", "signal": 3}, "signal must be text, found 3"),
        ({"path": "a.jsonl", "signal": "s[]"}, r"signal is 's\[\]', it must name a list"),
        ({"path": "a.txt", "signal": "s"}, "signal is for records, a.txt is text"),
        (
            {"path": "a.jsonl", "signal": "s", "text": "{title}\\n{text}"},
            r"signal counts the characters of one field, and .*text is '{title}\\\\n{text}'",
        ),
        ({"path": "a.jsonl", "signal": "s", "text": " {text}"}, "signal counts the characters"),
        ({"path": "a.jsonl", "signal": "s", "text": "{a[]}"}, "signal counts the characters"),
        ({"path": "a.jsonl", "signal": "s", "prompt": "{q}"}, "has both signal and prompt"),
        ({"path": "a.jsonl", "signal": "s", "messages": "m"}, "has both signal and messages"),
        ({"path": "a.jsonl", "noise": 0.1, "prompt": "{q}"}, "has both noise and prompt"),
        ({"path": "a.jsonl", "noise": 0.1, "messages": "m"}, "has both noise and messages"),
        ({"path": "a.jsonl", "noise": 0.1, "signal": "s"}, "has both signal and noise"),
        ({"path": "a.txt", "noise": 1}, r"noise is 1, it must be from 0 to 0\.9"),
        ({"path": "a.txt", "noise": -0.1}, "noise is -0.1, it must be from 0"),
        ({"path": "a.txt", "noise": math.nan}, "noise is nan, it must be from 0"),
        ({"path": "a.txt", "noise": True}, "noise must be a number, found True"),
        ({"path": "a.txt", "noise_seed": 1}, "noise_seed is 1, and .*noise is not set"),
        (
            {"path": "a.txt", "noise": 0.1, "noise_seed": 0.5},
            "noise_seed must be a whole number, found 0.5",
        ),
        ({"path": "a.tex"}, "its suffix tells no format"),
        ({"path": "."}, r"several formats \(jsonl, text\)"),
        ({"path": ".", "format": "parquet"}, "no such file.* of format parquet"),
    ],
)
def test_mistakes_in_settings(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.jsonl", "a.tex"):
        Path(name).write_text("x")
    with pytest.raises(UserError, match=message):
        parse_sources([entry], "sources")


def test_two_sources_need_two_names(tmp_path):
    path = str(write_records(tmp_path / "a.jsonl", {"text": "1"}))
    with pytest.raises(UserError, match="two entries have the name 'a'; set name"):
        parse_sources([path, path], "sources")
    with pytest.raises(UserError, match="sources must be a list"):
        parse_sources(path, "sources")


def test_identity_of_files_is_not_their_folder(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_records(tmp_path / folder / "a.jsonl", {"text": "same"})
    one, two = (source(tmp_path / folder / "a.jsonl").plan() for folder in ("one", "two"))
    assert one == two
    write_records(tmp_path / "two" / "a.jsonl", {"text": "sane"})
    assert source(tmp_path / "two" / "a.jsonl").plan() != one
