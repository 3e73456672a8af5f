"""The file of labels: what was written is read, and what is no label is said by line."""

import json

import pytest

from slm.errors import UserError
from slm.quality.labels import read_labels, write_labels
from text_helpers import write_records


def test_files_are_read_together_and_a_text_counts_once(tmp_path):
    rows = [{"id": "a", "label": 3, "source": "s", "text": "one\nZürich"}]
    write_labels(tmp_path / "a.jsonl", rows)
    more = [{"text": "two", "label": 0}, {"text": "one\nZürich", "label": 3}]
    found = read_labels([tmp_path / "a.jsonl", write_records(tmp_path / "b.jsonl", *more)])
    assert found == (["one\nZürich", "two"], [3, 0])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == rows[0]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "b", "label": 6}, "l.jsonl line 2: label is 6, expected a whole number from 0 t"),
        ({"text": "b", "label": 2.5}, "l.jsonl line 2: label is 2.5, expected a whole number"),
        ({"text": "b", "label": True}, "l.jsonl line 2: label is True, expected a whole number"),
        ({"label": 2}, "l.jsonl line 2 is damaged: it has no 'text'"),
        ([2], "l.jsonl line 2 is damaged: it has no 'label'"),
        ({"text": "a", "label": 1}, "line 2: label is 1, .*l.jsonl line 1 has 0 for the same text"),
    ],
)
def test_what_is_no_label_of_a_text(tmp_path, row, sentence):
    path = write_records(tmp_path / "l.jsonl", {"text": "a", "label": 0}, row)
    with pytest.raises(UserError, match=sentence):
        read_labels([path])


def test_nothing_and_no_file(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="labels: .*empty has no label"):
        read_labels([tmp_path / "empty"])
    with pytest.raises(UserError, match="labels: .*nope is no file"):
        read_labels([tmp_path / "nope"])
