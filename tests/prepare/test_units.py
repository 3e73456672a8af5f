"""Units cover the input in order, cut between records; a file that changed is noticed."""

import gzip
import json
import os
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm.prepare import scan
from slm.prepare.readers import read_blocks
from slm.prepare.records import read_texts
from slm.prepare.scan import BadText, scan_file
from slm.prepare.units import list_units, read_unit
from text_helpers import source, write_records

LIMIT = 2**20


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(scan, "UNIT_BYTES", 1000)


def all_at_once(sources):
    return [
        (block.source, block.copy, text.record, text.where, text.text, text.fault)
        for block in read_blocks(sources, LIMIT)
        for text in read_texts(block, sources[block.source], LIMIT)
    ]


def unit_by_unit(sources):
    """The same, records numbered on as the join does."""
    found, before = [], Counter()
    for unit in list_units(sources):
        records: Counter[int] = Counter()
        copies = {piece.source: piece.copy for piece in unit}
        for block in read_unit(unit, sources, LIMIT, records):
            for text in read_texts(block, sources[block.source], LIMIT):
                number = text.record + before[block.source, block.copy]
                head = (block.source, block.copy, number)
                found.append((*head, text.where, text.text, text.fault))
        for index, count in records.items():
            before[index, copies[index]] += count
    return found


def many_sources(folder):
    """Every way in which files are cut and numbered."""
    rows = [{"text": f"record {i} " + "x" * (i % 90)} for i in range(80)]
    lines = write_records(folder / "lines.jsonl", *rows)
    lines.write_text(lines.read_text().replace("record 40", "\\ud800") + "\n\nno end of line")
    (folder / "listed.json").write_text(json.dumps(rows, indent=1))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (folder / "rows.csv").write_text("text\n" + "".join(f'"a\n{i}"\n' for i in range(300)))
    (folder / "prose.txt").write_text("\n \nword\nline \t\r\n\n\n" * 200)
    (folder / "empty.jsonl").write_text("")
    table = pa.table({"text": [f"row {i} " + "y" * (i % 70) for i in range(300)]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=20)
    for i in range(30):
        (folder / "many" / f"{i:02}.txt").parent.mkdir(exist_ok=True)
        (folder / "many" / f"{i:02}.txt").write_text(f"file {i} " * (i * 3 + 1))
    return [
        source(lines, weight=2.5),
        source(folder / "listed.json"),
        source(folder / "empty.jsonl"),
        source(folder / "packed.jsonl.gz", weight=2),
        source(folder / "rows.csv"),
        source(folder / "prose.txt", document="paragraph"),
        source(folder / "prose.txt", document="line", name="lines of prose"),
        source(folder / "many", weight=1.5),
        source(lines, name="noisy", noise=0.2),
        source(folder / "rows.parquet", weight=1.5),
        source(folder / "rows.parquet", name="noisy rows", noise=0.2),
    ]


def test_units_are_the_input_in_its_order(tmp_path):
    sources = many_sources(tmp_path)
    units = list_units(sources)
    assert len(units) > 30
    cut = [piece for unit in units for piece in unit if piece.span is not None]
    assert {piece.source for piece in cut} == {0, 5, 6, 9}  # lines and row groups without noise
    assert max(piece.size for piece in cut if piece.source != 9) < 1300
    for unit in units:
        copies = {(piece.source, piece.copy) for piece in unit}
        assert len(copies) == len({index for index, _ in copies})  # one reading of each source
        assert len(unit) == 1 or sum(piece.size for piece in unit) <= 1000
    assert sum(p.size for u in units for p in u if p.source < 3) == (
        3 * sources[0].scans[sources[0].files[0]].size + (tmp_path / "listed.json").stat().st_size
    )
    assert unit_by_unit(sources) == all_at_once(sources)


def test_what_fits_one_unit_is_one(tmp_path, monkeypatch):
    sources = many_sources(tmp_path)
    monkeypatch.setattr(scan, "UNIT_BYTES", 10**9)
    assert len(list_units([replace(one) for one in sources])) == 1  # which looked at no file yet


def test_a_cut_stands_behind_a_separator_with_the_lines_before_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(2000)))
    seen = source(path).scans[str(path)]
    data = path.read_bytes()
    assert len(seen.cuts) == len(data) // 1000 - (len(data) % 1000 < 10)
    for cut in seen.cuts:
        assert data[: cut.position].endswith(b"\n")
        assert data[: cut.position].count(b"\n") == cut.line
    assert scan_file(str(path), None).cuts == ()


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_changes_is_named_with_both_hashes(tmp_path, when):
    path = write_records(tmp_path / "a.jsonl", *({"text": "abc"} for _ in range(400)))
    one = source(path)
    units, before = list_units([one]), one.scans[str(path)]
    blocks = read_unit(units[1], [one], LIMIT, Counter())
    if when == "while":
        next(blocks)
    os.utime(path, ns=(1, 1))  # touched, and the same
    before.check_unchanged()
    path.write_bytes(path.read_bytes().replace(b"abc", b"abd", 1))
    now = scan_file(str(path), None)
    with pytest.raises(BadText) as error:
        list(blocks)
    size = f"{before.size:,} bytes with sha256"
    assert str(error.value).startswith(
        f"{path} has changed since the run began: {size} {before.sha256} then, {size} {now.sha256} "
    )
