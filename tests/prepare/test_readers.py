"""Blocks: what is read of files and tables, in which order, and which files are refused."""

import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm.errors import UserError
from slm.prepare import readers
from slm.prepare.documents import LINE_END
from slm.prepare.readers import cut, open_stream, read_blocks
from slm.prepare.records import read_texts
from text_helpers import LIMIT, source, texts, write_records


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 2**19])
@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_blocks_do_not_change_records(tmp_path, monkeypatch, block_bytes, document):
    path = tmp_path / "a.txt"
    path.write_text("a b\nc\n\n\n" + "long " * 9 + "\nx\n\n  \ny\n\nend")
    expected = texts(path, document=document)
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    assert texts(path, document=document) == expected
    with open_stream(str(path)) as stream:
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
    path.write_text("n,text\n0," + "a" * (csv.field_size_limit() + 1))
    with pytest.raises(UserError, match=r"a\.csv, line 2: field larger than field limit"):
        texts(path)
    path.write_text('n,"te"xt\n0,a\n')
    with pytest.raises(UserError, match=r"a\.csv: its first row has quotes that do not match"):
        texts(path)


def test_a_row_with_unmatched_quotes_is_one_bad_record(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('n,text\n0,"a"b\n1,"c\n2,"d\n3,e\n4,"f\n5,g\n')
    reason = "has quotes that do not match (lines"
    assert texts(path) == [
        (0, f"a.csv, row 1 {reason} 2 to 2): ',' expected after '\"'"),
        (1, f"a.csv, row 2 {reason} 3 to 4): ',' expected after '\"'"),
        (2, "e"),
        (3, f"a.csv, row 4 {reason} 6 to 7): unexpected end of data"),
    ]


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
