"""Requests about documents, and labels in answers of a server, a batch API and a person."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from slm.errors import UserError
from slm.quality.annotate import PROMPT, NoLabel, annotate, label_in
from slm.score.batch import batch_line
from text_helpers import write_records

TEXTS = [f"text {i} of some words" for i in range(40)]


@pytest.fixture
def sources(tmp_path) -> list[Any]:
    write_records(tmp_path / "a.jsonl", *[{"text": text} for text in TEXTS[:25] + TEXTS[:5]])
    write_records(tmp_path / "b.jsonl", *[{"body": text} for text in TEXTS[25:]])
    return [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "text": "{body}"}]


def id_of(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def requested(sources: Any, tmp_path: Path, **settings: Any) -> list[Any]:
    return rows(annotate(sources, "judge", requests=tmp_path / "r.jsonl", **settings))


def answers(tmp_path: Path, *records: Any) -> Path:
    return write_records(tmp_path / "answers.jsonl", *records)


def person(text: str, label: Any) -> Any:
    return {"custom_id": id_of(text), "label": label}


def test_requests_are_about_random_different_documents(sources, tmp_path):
    found = requested(sources, tmp_path, num_documents=40)
    assert sorted(row["custom_id"] for row in found) == sorted(map(id_of, TEXTS))  # none twice
    part = requested(sources, tmp_path, num_documents=12)
    assert [row["custom_id"] for row in part] == [row["custom_id"] for row in found[:12]]
    other = requested(sources[::-1], tmp_path, num_documents=12)
    assert other == part  # whatever the order of files
    seeded = {row["custom_id"] for row in requested(sources, tmp_path, num_documents=12, seed=1)}
    assert len(seeded) == 12 and seeded != {row["custom_id"] for row in part}
    assert not {id_of(text) for text in TEXTS[25:]}.isdisjoint(row["custom_id"] for row in part)


def test_a_request_is_the_prompt_with_the_beginning_of_the_document(sources, tmp_path):
    (tmp_path / "p.txt").write_text("Judge: {text}\nBriefly.")
    asked = {"prompt": tmp_path / "p.txt", "max_characters": 6, "num_documents": 3}
    for row in requested(sources, tmp_path, **asked):
        (text,) = [text for text in TEXTS if id_of(text) == row["custom_id"]]
        body: dict[str, Any] = {"model": "judge", "temperature": 0, "max_tokens": 512}
        body["messages"] = [{"role": "user", "content": f"Judge: {text[:6]}\nBriefly."}]
        assert row == batch_line(id_of(text), "/v1/chat/completions", body)
    row = requested(sources, tmp_path, num_documents=1)[0]
    before, after = PROMPT.read_text().split("{text}")
    content = row["body"]["messages"][0]["content"]
    assert content.startswith(before) and content.endswith(after) and "words" in content
    (tmp_path / "p.txt").write_text("Judge it.")
    with pytest.raises(UserError, match="p.txt: the prompt has {text} 0 times, once is needed"):
        requested(sources, tmp_path, prompt=tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ("It explains 7 things.\nScore: 3", 3),
        ("Score: 1, said somebody.\n**Educational score: 4**\n", 4),
        ("5", 5),
        ("Reasons.\n\n0\n", 0),
        ("score = 2/5", 2),
        ("Total score: 3 points.", 3),
    ],
)
def test_the_label_of_an_answer(content, label):
    body = {"model": "judge", "choices": [{"message": {"content": content}}]}
    assert label_in({"custom_id": "x"} | body, "judge", "here") == label
    wrapped = {"custom_id": "x", "response": {"status_code": 200, "body": body}, "error": None}
    assert label_in(wrapped, "judge", "here") == label


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("Score: 7", "here: label is 7, expected a whole number from 0 to 5"),
        ("Score: 3.5", 'here: the answer has no line `Score: 3` in it: "Score: 3.5"'),
        ("I cannot say.", "here: the answer has no line"),
        (None, "here: choices.0..message.content is null, it must be a text"),
    ],
)
def test_an_answer_without_a_label(content, sentence):
    body = {"choices": [{"message": {"content": content}}]}
    with pytest.raises(NoLabel, match=sentence):
        label_in({"custom_id": "x"} | body, "judge", "here")


def test_labels_stand_beside_their_documents_in_the_order_of_the_requests(sources, tmp_path):
    asked = [row["custom_id"] for row in requested(sources, tmp_path, num_documents=6)]
    by_id = {id_of(text): text for text in TEXTS}
    given = [{"custom_id": name, "label": i} for i, name in enumerate(asked[:5])]
    files = [answers(tmp_path, *given[::-1]), write_records(tmp_path / "more.jsonl", given[0])]
    out = annotate(sources, "judge", num_documents=6, responses=files, out=tmp_path / "l.jsonl")
    assert [(row["id"], row["label"], row["text"]) for row in rows(out)] == [
        (name, i, by_id[name]) for i, name in enumerate(asked[:5])
    ]
    where = {text: "a" if text in TEXTS[:25] else "b" for text in TEXTS}
    assert all(row["source"] == where[row["text"]] for row in rows(out))


def test_what_is_no_label_of_these_documents_is_refused(sources, tmp_path, caplog):
    def read(*records: Any, **settings: Any) -> Path:
        given: Any = {"num_documents": 40, "out": tmp_path / "l.jsonl"} | settings
        return annotate(sources, "judge", responses=answers(tmp_path, *records), **given)

    good, bad = person(TEXTS[0], 3), person(TEXTS[1], 6)
    with pytest.raises(UserError, match="line 1: custom_id is '.*', which is none of the 40 doc"):
        read(person("unknown", 3))
    with pytest.raises(UserError, match="line 2: label is 4, another line about it has 3"):
        read(good, person(TEXTS[0], 4))
    with pytest.raises(UserError, match="line 2: label is 6, expected a whole number from 0 to 5"):
        read(good, bad)
    with pytest.raises(UserError, match="model is 'other', served_model is 'judge'"):
        read({"custom_id": id_of(TEXTS[2]), "model": "other", "choices": []})
    with pytest.raises(UserError, match="answers.jsonl has no label of 40 documents"):
        read(bad, on_bad_answer="skip")
    assert not (tmp_path / "l.jsonl").exists()
    assert len(rows(read(good, bad, on_bad_answer="skip"))) == 1
    assert "1 answers have no label" in caplog.text


def test_what_does_not_go_together(sources, tmp_path):
    given: dict[str, Any]
    for given in ({}, {"requests": "r", "responses": "a"}):
        with pytest.raises(UserError, match="exactly one of requests and responses must be given"):
            annotate(sources, "judge", **given)
    with pytest.raises(UserError, match="out is the file of the labels: it goes with responses"):
        annotate(sources, "judge", requests=tmp_path / "r", out=tmp_path / "l")
