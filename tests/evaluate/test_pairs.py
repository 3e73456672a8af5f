"""BLiMP's pairs and the endings of stories as documents of a multiple-choice task."""

import json

import pytest

from slm.errors import UserError
from slm.evaluate.pairs import read_blimp, read_completion, split_story
from text_helpers import DATA, needs_data, write_records


def pair(uid: str, term: str, good: str, bad: str) -> dict[str, str]:
    return {"sentence_good": good, "sentence_bad": bad, "linguistics_term": term, "UID": uid}


def test_the_bad_sentence_stands_first(tmp_path):
    write_records(
        tmp_path / "b.jsonl", pair("b", "x", "He is.", "He are."), pair("b", "x", "A", "B")
    )
    write_records(tmp_path / "a.jsonl", pair("a", "y", "I am.", "I is."))
    found = read_blimp(tmp_path, limit=1)
    assert found == [
        {"context": "", "choices": ["I is.", "I am."], "target": 1, "group": "y/a"},
        {"context": "", "choices": ["He are.", "He is."], "target": 1, "group": "x/b"},
    ]
    assert len(read_blimp(tmp_path, None)) == 3


@needs_data
def test_all_of_blimp_is_read():
    found = read_blimp(DATA / "eval" / "blimp", None)
    groups = {one["group"] for one in found}
    assert len(found) == 67 * 200 and len(groups) == 67
    assert len({group.split("/")[0] for group in groups}) == 13


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: Expecting"),
        (
            json.dumps({"sentence_good": "a", "sentence_bad": "b"}),
            "field 'linguistics_term' is mis",
        ),
        (json.dumps(pair("u", "t", "", "b")), "a.jsonl:2: a sentence is empty"),
        (json.dumps(pair("u", "t", "\ud800", "b")), "a.jsonl:2: .*surrogates"),
    ],
)
def test_a_damaged_pair_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(pair("a", "y", "I", "me")) + f"\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_blimp(tmp_path, None)


def test_a_folder_without_pairs_is_named(tmp_path):
    with pytest.raises(UserError, match="has no .jsonl files: it must be the folder with those of"):
        read_blimp(tmp_path, None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One day. It rained.\n", ("One day.", " It rained.")),
        ("A 2.5 m wall. Up!", ("A 2.5 m wall.", " Up!")),
        ('"Go!" he said. They went', ('"Go!" he said.', " They went")),
        ('He said: "Stop." \n\nThe end.', ('He said: "Stop."', " \n\nThe end.")),
        ("Only one sentence.", None),
        ("", None),
    ],
)
def test_a_story_ends_with_its_last_sentence(text, parts):
    assert split_story(text) == parts


def test_endings_are_those_of_other_stories(tmp_path):
    texts = [f"Story {n} begins. It ends as {n}." for n in range(6)]
    texts += [texts[0], "Too short.", "Another begins. It ends as 0."]
    path = write_records(tmp_path / "s.jsonl", *[{"text": text} for text in texts])
    found = read_completion([{"path": str(path)}], None)
    assert [one["context"] for one in found[:2]] == ["Story 0 begins.", "Story 1 begins."]
    assert len(found) == 7  # the repeated and the short one are left out
    for one in found:
        assert one["target"] == 3 and len(set(one["choices"])) == 4
        assert set(one["choices"]) <= {f" It ends as {n}." for n in range(6)}
    assert [one["choices"][3] for one in found] == [f" It ends as {n}." for n in [*range(6), 0]]
    assert found == read_completion([{"path": str(path)}], None)
    assert read_completion([{"path": str(path)}], 2) == found[:2]
    assert len({tuple(one["choices"][:3]) for one in found}) > 3  # not the same for all


def test_stories_are_a_source_of_any_text(tmp_path):
    (tmp_path / "s.txt").write_text("\n\n".join(f"A {n}. B {n}." for n in range(4)))
    entry = {"path": str(tmp_path / "s.txt"), "document": "paragraph"}
    assert len(read_completion([entry], None)) == 4
    with pytest.raises(UserError, match="stories: 1 documents have 1 different last sentences af"):
        read_completion([entry | {"document": "file"}], None)
    with pytest.raises(UserError, match="stories: 0 documents have 0 different last"):
        read_completion([], None)
