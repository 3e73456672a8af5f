"""Kinds of values against lists of what fits and what does not; keys that nobody reads."""

import math

import pytest

from slm.checks import (
    Kind,
    anything,
    check,
    each,
    either,
    file,
    flag,
    folders,
    number,
    optional,
    real,
    section,
    sections,
    seed,
    several,
    text,
    texts,
    whole,
    word,
)
from slm.errors import UserError

FITS = [
    (whole(1), [1, 2, 10**15], [0, -1, 1.0, 1.5, True, None, "1", "100K", 2**63]),
    (whole(0, 9), [0, 9], [-1, 10]),
    (seed, [0, 2**32 - 1], [-1, 2**32, None, "abc"]),
    (real(0), [0, 0.0, 1e30], [-1e-9, math.inf, math.nan, True, "0.1", None]),
    (real(0, ends="()"), [1e-9], [0, 0.0, -1]),
    (real(0, 1, "[)"), [0, 0.999], [1, 1.0, 2]),
    (real(0, 1), [0, 1], [1.001]),
    (number, [-3, 0.5], [math.nan, "x", False]),
    (word("auto", "never"), ["auto"], ["Auto", None, 1, ""]),
    (text, ["a"], ["", None, 3]),
    (flag, [True, False], [0, 1, "true", None]),
    (optional(whole(1)), [None, 1], [0, ""]),
    (each(real(0, 1, "[)"), 2), [[0.9, 0.95]], [[0.9], [0.9, 0.9, 0.9], [0.9, 1.0], 0.9, "ab"]),
    (several(text), [["a"], ["a", "b"]], [[], "ab", ["a", 3], None, {"a": "b"}]),
    (several(whole(1), least=0), [[], [3]], [[0], None]),
    (texts, ["a", ["a", "b"]], ["", [], [""], {"a": "b"}, 3]),
    (either(flag, whole(2)), [True, 2], [1, "true", None]),
    (folders, [{"a": "b"}, {"a": "b", "c": "d"}], [{}, {"a": None}, {0.4: "b"}, ["a"], "a", None]),
    (section, [{}, {"a": 3}], [None, "a", 3, ["a"]]),
    (sections, [{}, {"a": {}}], [{"a": 3}, {"a": None}, ["a"], None]),
    (file, ["no-such-file.csv"], [".", "", None, 3]),
]


@pytest.mark.parametrize(("kind", "good", "bad"), FITS)
def test_what_fits(kind: Kind, good: list, bad: list):
    for value in good:
        check({"a": {"key": value}}, {"a.key": kind})
    for value in bad:
        with pytest.raises(UserError, match="^a.key is .*, it must be "):
            check({"a": {"key": value}}, {"a.key": kind})


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        (whole(1), "100K", "k is '100K', it must be a whole number of at least 1"),
        (optional(seed), -1, "k is -1, it must be a whole number from 0 to 4294967295, or null"),
        (real(0, 1, "(]"), 0, "k is 0, it must be a number in (0, 1]"),
        (whole(1), 1e6, "k is 1000000.0, it must be a whole number of at least 1, as in 1_000_000"),
        (optional(whole(0, 9)), 10.0, "k is 10.0, it must be a whole number from 0 to 9, or null"),
        (whole(), math.inf, "k is inf, it must be a whole number of at least 1"),
        (each(real(0), 2), [1], "k is [1], it must be a list of 2, each a number of at least 0"),
    ],
)
def test_the_sentence_names_key_value_and_range(kind, value, sentence):
    with pytest.raises(UserError) as raised:
        check({"k": value}, {"k": kind})
    assert str(raised.value) == sentence


def test_a_key_that_nothing_reads_is_refused_by_name():
    table = {"batch_size": whole(), "node": anything, "node.size": whole(), "of.one": anything}
    check({"node": {"whatever": 1}, "of": {"one": {"x": 1}}}, table)
    for config, sentence in (
        ({"batchsize": 3}, "batchsize is given, and nothing reads it, did you mean batch_size?"),
        ({"of": {"two": 2}}, "of.two is given, and nothing reads it, did you mean of.one?"),
        ({"zzz": {}}, "zzz is given, and nothing reads it"),
    ):
        with pytest.raises(UserError) as raised:
            check(config, table)
        assert str(raised.value) == sentence
    with pytest.raises(UserError, match="^steps is given, tokens does its work$"):
        check({"steps": 3}, table, {"steps": "tokens does its work"})


@pytest.mark.parametrize("value", ["folder", {}])
def test_a_section_that_is_given_a_value_names_its_keys(value):
    table = {"tokenizer.path": text, "tokenizer.size": whole(1), "tokens": flag}
    with pytest.raises(
        UserError, match="^tokenizer has keys of its own .*: give path, size in it$"
    ):
        check({"tokenizer": value}, table)
