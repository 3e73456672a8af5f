"""What is said of generated texts, by hand."""

import json
from typing import Any

import pytest

from slm.errors import UserError
from slm.evaluate.speech import distinct, read_speech, repetition, summaries, summary, write_speech


def row(text: str, num_tokens: int, ended: bool = False, **more: Any) -> dict[str, Any]:
    base = {"model": "m", "prompt": "p", "text": text, "num_tokens": num_tokens, "ended": ended}
    return base | more


def test_distinct_n_counts_over_all_texts():
    texts = [["a", "b", "a"], ["a", "b"]]
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3  # ab, ba, ab
    assert distinct(texts, 3) == 1.0
    assert distinct(texts, 4) is None
    assert distinct([], 1) is None


def test_repetition_is_what_stood_before():
    assert repetition("a b c d e".split()) == 0.0
    assert repetition("x x x x x x".split()) == pytest.approx(2 / 3)  # of three 4-grams one is new
    assert repetition("a b c d a b c d".split()) == pytest.approx(1 / 5)
    assert repetition("a b c".split()) is None


def test_the_summary_of_all_texts():
    rows = [
        row("The cat, the CAT!", 6, True, copied_tokens=3, longest_copied_tokens=3),
        row("x x x x x x", 4, False, copied_tokens=0, longest_copied_tokens=0),
    ]
    found = summary(rows)
    assert found == {
        "texts": 2,
        "mean_tokens": 5.0,
        "ended": 0.5,
        "distinct_1": 3 / 10,
        "distinct_2": 3 / 8,
        "distinct_3": 3 / 6,
        "repetition": pytest.approx((0 + 2 / 3) / 2),
        "copied": 0.3,
        "longest_copied_tokens": 3,
    }
    bare = summary([row("", 0)])
    assert bare["distinct_1"] is bare["repetition"] is bare["copied"] is None
    other = rows[0] | {"model": "n"}
    assert [one["model"] for one in summaries([*rows, other, rows[1]])] == ["m", "n"]
    assert summaries([*rows, other])[1]["texts"] == 1


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row("line\nline \u2028 \U0001f600", 3), row("", 0, True)]
    write_speech(tmp_path / "s.jsonl", rows)
    assert read_speech(tmp_path / "s.jsonl") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "s.jsonl:1: Expecting"),
        ("[]", r"s.jsonl:1: \[\] is no text of slm speak"),
        (json.dumps({"model": "m"}), "s.jsonl:1.*prompt"),
        (json.dumps(row("a", -1)), "s.jsonl:1.*num_tokens is -1"),
        (json.dumps(row("a", 1, copied_tokens=1)), "s.jsonl:1.*longest_copied_tokens"),
        ("", "s.jsonl has no text"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_speech(tmp_path / "s.jsonl")
    with pytest.raises(UserError, match="no.jsonl is no file: it must be what slm speak wrote"):
        read_speech(tmp_path / "no.jsonl")
