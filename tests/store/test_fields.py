"""What a record must hold; what is refused in one sentence."""

from pathlib import Path

import pytest

from slm.errors import UserError
from slm.store.fields import (
    COLUMN,
    FILES,
    INDEX,
    NUMBER,
    SHA256,
    SIZE,
    TEXT,
    check_fields,
    list_of,
    mapping,
    of_what,
    one_of,
    optional,
)

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (SIZE, [1, 2**40], [0, -1, 1.0, True, "1", None, 2**64]),
        (INDEX, [0, 7], [-1, 0.0, False, [0]]),
        (NUMBER, [0, 1.5], [-1, float("nan"), float("inf"), True, "1"]),
        (TEXT, ["", "a"], [1, None, ["a"]]),
        (SHA256, [DIGEST], [DIGEST[1:], DIGEST.upper(), 3, DIGEST + "\n"]),
        (one_of("a", "b"), ["a"], ["c", [], {}, None]),
        (optional(TEXT), [None, "a"], [0]),
        (list_of(TEXT), [[], ["a"]], ["a", [1], {}]),
        (mapping(COLUMN, INDEX), [{}, {"tokens": 3}], [{"../x": 3}, {"tokens": "3"}, []]),
        (
            FILES,
            [{"model-1.safetensors": DIGEST}],
            [{n: DIGEST} for n in ("../a", "a/b", "/a", "..", ".", "", "a\0b")] + [{"a": "x"}],
        ),
    ],
)
def test_types_and_ranges(field, good, bad):
    for value in good:
        check_fields(Path("f.json"), {"x": value}, {"x": field})
    for value in bad:
        with pytest.raises(UserError, match=r"^f\.json: x is .*, expected "):
            check_fields(Path("f.json"), {"x": value}, {"x": field})
    with pytest.raises(UserError, match="f.json is damaged: it has no 'x'"):
        check_fields(Path("f.json"), {}, {"x": field})


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("tokenizer_sha256", "what maps text to ids"),
        ("tokenizer.sha256", "what maps text to ids"),
        ("sources[0].files_sha256", "the names and contents of the source's files"),
        ("references", "the scores and the corpus they are of"),
    ],
)
def test_of_two_hashes_that_differ_is_said_what_they_are_of(field, said):
    assert of_what(field, "a" * 64, None).startswith(f" (a hash of {said}")


def test_of_other_values_nothing_more_is_said():
    assert of_what("seed", 1, 2) == of_what("init_from", "gpt2", None) == ""
