"""Row groups of a Parquet file: where it is cut, and that every row is read once."""

import datetime
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm.errors import UserError
from slm.prepare import scan
from slm.prepare.parquet import read_rows, row_groups
from slm.prepare.units import list_units, read_unit
from text_helpers import source

LIMIT = 2**20


def test_a_table_is_cut_between_row_groups_and_no_row_is_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "UNIT_BYTES", 1000)
    rows = [f"row {i} " + "y" * (i % 70) for i in range(300)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=20)
    one = source(tmp_path / "a.parquet")
    seen = one.scans[str(tmp_path / "a.parquet")]
    assert len(seen.cuts) > 3 and all(cut.line % 20 == 0 for cut in seen.cuts)
    parts = []
    for unit in list_units([one]):
        blocks = list(read_unit(unit, [one], LIMIT, Counter()))
        assert [block.record for block in blocks] == list(range(len(blocks)))
        parts.append([(block.line, block.data) for block in blocks])
    assert sum(parts, []) == [(line, {"text": row}) for line, row in enumerate(rows)]
    assert [len(part) for part in parts[:-1]] == np.diff([0, *(c.line for c in seen.cuts)]).tolist()


def test_rows_are_those_of_the_table_whatever_is_asked_for(tmp_path):
    """Nested columns, nulls and other types; more rows than are read at once."""
    when = datetime.datetime(2024, 5, 6)
    rows = [
        {
            "text": f"t{i}" if i % 7 else None,
            "chat": [{"role": "user", "n": i}] * (i % 3),
            "at": when,
        }
        for i in range(700)
    ]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    assert list(read_rows(path, ["nothing"])) == rows
    assert list(read_rows(path, ["chat"])) == [{"chat": row["chat"]} for row in rows]
    starts = [0, *(cut.position for cut in row_groups(path))]
    edges = zip(starts, [*starts[1:], None], strict=True)
    parts = [list(read_rows(path, ["text", "at"], *edge)) for edge in edges]
    assert [len(part) for part in parts] == [300, 300, 100]
    assert sum(parts, []) == [{"text": row["text"], "at": row["at"]} for row in rows]


def test_what_is_no_table_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(
        UserError, match="a.parquet cannot be read as parquet: Parquet file size is"
    ):
        row_groups(str(tmp_path / "a.parquet"))
