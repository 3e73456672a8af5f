"""Rows end to end: where documents begin, and where a token that is wrong stands."""

from typing import Any

import pyarrow as pa
import pytest

from slm.prepare.imports.rows import beside, read_rows

ROWS = [[11, 12, 13], [], [21], [31, 32, 33, 34]]
STARTS = [1, 0, 0, 1, 1, 0, 1, 0]  # by hand, of the documents below
LENGTHS = [[3], [], [1], [2, 2]]
POSITIONS = [[0, 1, 2], [], [0], [0, 1, 0, 1]]


def table(kind=pa.list_, number: Any = None, **columns) -> pa.Table:
    lists = {"input_ids": ROWS} | columns
    return pa.table({k: pa.array(v, kind(number or pa.int64())) for k, v in lists.items()})


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("number", [pa.uint16(), pa.int32(), pa.int64()])
@pytest.mark.parametrize(
    "columns",
    [
        {"seq_lengths": LENGTHS},
        {"position_ids": POSITIONS},
        {"seq_lengths": LENGTHS, "position_ids": POSITIONS},
    ],
)
def test_documents_begin_where_either_column_says(columns, number, kind):
    rows = read_rows(table(kind, number, **columns), 100, 35)
    assert rows.ids.tolist() == [11, 12, 13, 21, 31, 32, 33, 34]
    assert rows.lengths.tolist() == [3, 0, 1, 4]
    assert rows.first.tolist() == [bool(start) for start in STARTS]


def test_a_row_alone_is_a_document():
    rows = read_rows(table(attention_mask=[[1] * len(row) for row in ROWS]), 0, 35)
    assert rows.first.tolist() == [True, False, False, True, True, False, False, False]


def test_a_slice_of_a_table_is_read_from_its_own_beginning():
    """What map and a batch give is a slice of a longer column."""
    rows = read_rows(table(seq_lengths=LENGTHS).slice(2, 2), 2, 35)
    assert rows.ids.tolist() == [21, 31, 32, 33, 34]
    assert rows.first.tolist() == [True, True, False, True, False]
    fixed = pa.table({"input_ids": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2))})
    assert read_rows(fixed.slice(1), 1, 35).ids.tolist() == [3, 4, 5, 6]


def test_places_name_the_row_of_the_dataset():
    rows = read_rows(table(), 100, 35)
    places = [rows.place("labels", index) for index in range(8)]
    expected = [
        f"row {100 + r}: labels[{i}]" for r, row in enumerate(ROWS) for i in range(len(row))
    ]
    assert places == expected


def test_a_column_beside_has_an_entry_a_token():
    found = table(reference_logprob=[[None, -1, -2], [], [None], [None, -4, -5, -6]])
    rows = read_rows(found, 0, 35)
    assert beside(found, "reference_logprob", rows)[[1, 2, 5, 7]].tolist() == [-1, -2, -4, -6]
    short = table(labels=[[11, 12, 13], [], [], [31, 32, 33, 34]])
    with pytest.raises(ValueError, match="row 7: labels has 0 entries, input_ids has 1"):
        beside(short, "labels", read_rows(short, 5, 35))


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"seq_lengths": [[3], [], [1], [2, 1]]}, r"row 8: seq_lengths is \[2, 1\]"),
        ({"seq_lengths": [[3, 1], [], [], [4]]}, r"row 5: seq_lengths is \[3, 1\]"),
        ({"seq_lengths": [[3], [0], [1], [4]]}, r"row 6: seq_lengths is \[0\]"),
        (
            {"position_ids": [[0, 1, 2], [], [0], [0, 1, 3, 4]]},
            r"row 8: position_ids\[2\] is 3, 2 is",
        ),
        ({"attention_mask": [[1, 1, 1], [], [0], [1] * 4]}, r"row 7: attention_mask\[0\] is 0"),
        ({"input_ids": [[35]]}, r"row 5: input_ids\[0\] is 35, the vocabulary has 35"),
        ({"input_ids": [[1], None]}, "row 6: input_ids is null"),
        ({"input_ids": [[1, None]]}, "column input_ids holds int64, 1 of them null"),
    ],
)
def test_what_is_wrong_is_named(columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_rows(table(**columns), 5, 35)
