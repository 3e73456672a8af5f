"""13 words in a row: found exactly, by whole records, whatever stands between the words."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from slm.errors import UserError
from slm.prepare.overlap import WORD, Excluded, Exclusion, Overlap, ngram_keys, read_exclusion
from slm.prepare.readers import read_blocks
from slm.prepare.records import read_texts
from slm.prepare.sources import parse_sources
from text_helpers import DATA, LIMIT, needs_data

WORDS = [f"w{i}" for i in range(20)]


def read(*entries) -> Exclusion:
    return read_exclusion(parse_sources(list(entries), "exclude"), LIMIT)


def write(path: Path, *documents: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def shared(overlap: Overlap, text: str) -> np.ndarray:
    found = overlap.find(text)
    assert found is not None
    return found[1]


@pytest.mark.slow
@needs_data
def test_math_500_shares_13_grams_with_math():
    """47 of the 500 problems, in words of letters and digits, over whole training records."""
    exclusion = read({"path": str(DATA / "eval" / "math_500.jsonl"), "text": "{problem}"})
    problems = (DATA / "eval" / "math_500.jsonl").read_text().splitlines()
    words = [" ".join(WORD.findall(json.loads(p)["problem"].lower())) for p in problems]
    path = str(DATA / "curated" / "math_train_4500.jsonl")
    sources = parse_sources([{"path": path, "text": "{problem}\n{solution}"}], "sources")
    for block in read_blocks(sources, LIMIT):
        for text in read_texts(block, sources[0], LIMIT):
            found = exclusion.overlap.find(text.text)
            if found is not None:
                assert exclusion.note(found[1]) == [0]
                assert len(found[0].split()) == 13
                assert any(found[0] in problem for problem in words)
    assert exclusion.report() == {
        "math_500": {
            "records": 500,
            "records_found": 47,
            "records_too_short": 51,
            "documents_dropped": 119,
        }
    }


def test_find_by_hand(tmp_path):
    path = write(tmp_path / "e.jsonl", "; ".join(WORDS[:15]).upper(), "too short")
    overlap = read(path).overlap
    assert len(overlap.keys) == 3
    ngram, keys = overlap.find("before " + ", ".join(WORDS) + " after") or ("", [])
    assert (ngram, sorted(keys)) == (" ".join(WORDS[:13]), [0, 1, 2])
    assert len(shared(overlap, " ".join(WORDS[2:]))) == 1
    assert overlap.find(" ".join(WORDS[3:])) is None  # 12 in a row
    assert overlap.find(" ".join(WORDS[:12] + ["x"] + WORDS[12:13])) is None
    assert overlap.find(" ".join(reversed(WORDS))) is None
    assert overlap.find("") is None


SENTENCES = {
    "Chinese": "人工智能的发展正在改变我们的生活方式，许多新的技术不断出现。",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "Thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำในประโยคเดียวกัน",
    "Khmer": "ភាសាខ្មែរមិនមានចន្លោះរវាងពាក្យទេ",
    "Burmese": "မြန်မာစာတွင်စကားလုံးများကြားနေရာလွတ်မရှိပါ",
}


@pytest.mark.parametrize("sentence", SENTENCES.values(), ids=list(SENTENCES))
def test_scripts_without_spaces_are_found_by_13_characters(tmp_path, caplog, sentence):
    overlap = read(write(tmp_path / "e.jsonl", sentence)).overlap
    assert len(shared(overlap, f"GPT4と{sentence} and more")) == len(overlap.keys)
    words = WORD.findall(sentence)
    assert overlap.find("".join(words[2:15])) is not None  # 13 of them, without punctuation
    assert overlap.find("".join(words[2:14])) is None
    assert overlap.find(sentence[::-1]) is None
    assert not caplog.records


def test_words_with_spaces_between_them_are_runs_as_ever():
    text = "It's naïve_1 — привет, 안녕하세요 세계 नमस्ते x2+y ελληνικά".lower()
    assert WORD.findall(text) == re.findall(r"\w+", text)
    assert WORD.findall("gpt4は強い ok") == ["gpt4", "は", "強", "い", "ok"]


def test_a_text_with_hardly_a_word_is_warned_of(tmp_path, caplog):
    runes = "\U00012000\U00012001" * 200  # cuneiform, in one run
    read(write(tmp_path / "e.jsonl", runes, " ".join(WORDS), "short " * 3, "x" * 100))
    (record,) = caplog.records
    assert record.message.startswith("exclude e: 1 of 4 records have less than one word in 20 ch")


def test_note_counts_documents_and_records(tmp_path):
    one = write(tmp_path / "e.jsonl", " ".join(WORDS[:13]), "too short", " ".join(WORDS[:14]))
    two = write(tmp_path / "f.jsonl", " ".join(WORDS[5:20]))
    exclusion = read(one, two)
    both = Excluded(0, "a.jsonl, line 1", 0, "n", shared(exclusion.overlap, " ".join(WORDS)))
    row = json.loads(exclusion.line(both, "a"))
    assert row == {
        "source": "a",
        "where": "a.jsonl, line 1",
        "record": 0,
        "ngram": "n",
        "found_in": ["e", "f"],
    }
    assert exclusion.note(shared(exclusion.overlap, " ".join(WORDS[1:14]))) == [0]
    names = ("records", "records_found", "records_too_short", "documents_dropped")
    assert exclusion.report() == {
        "e": dict(zip(names, (3, 2, 1, 2), strict=True)),
        "f": dict(zip(names, (1, 1, 0, 1), strict=True)),
    }


def test_bad_and_short_evaluation_files_are_refused(tmp_path):
    path = write(tmp_path / "e.jsonl", "too short")
    with pytest.raises(UserError, match="no record has 13 words"):
        read(path)
    (tmp_path / "e.jsonl").write_text('{"text": 5}')
    with pytest.raises(UserError, match=r"e\.jsonl, line 1: field 'text' is a number"):
        read(path)


def test_ngram_keys_depend_on_order_and_content():
    ids = np.arange(40)
    keys = ngram_keys(ids)
    assert len(keys) == 28 and len(np.unique(keys)) == 28
    assert ngram_keys(ids[3:20]).tolist() == keys[3:8].tolist()
    swapped = ids[:13].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert ngram_keys(swapped)[0] != keys[0]
