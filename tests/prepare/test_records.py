"""Templates and records: every bad record names its file, line and field."""

import gzip
import json

import pytest

from slm.errors import UserError
from slm.prepare.documents import BadRecord
from slm.prepare.readers import read_blocks
from slm.prepare.records import read_texts
from slm.prepare.template import Template
from text_helpers import DATA, LIMIT, needs_data, source, texts, write_records

# ---- templates ----------------------------------------------------------------------------------

RECORD = {
    "q": "Why?",
    "n": 3,
    "none": None,
    "blank": "  ",
    "a": {"b": {"c": "deep"}},
    "list": [{"t": "one"}, {"t": "two"}],
    "tags": ["x", "y"],
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{q}", "Why?"),
        ("Q: {q}\\nA:\\t{a.b.c}\n", "Q: Why?\nA:\tdeep\n"),
        ("{list[].t}", "one\ntwo"),
        ("{list[; ].t} {tags[\\n\\n]}", "one; two x\n\ny"),
        ("{tags[1]}{list[0].t}", "yone"),
        ("{{{q}}} {n!s}", "{Why?} 3"),
        ("{q}{blank}", "Why?  "),
    ],
)
def test_template(template, expected):
    assert Template(template).render(RECORD) == expected


@pytest.mark.parametrize(
    ("template", "field", "reason"),
    [
        ("{answer}", "answer", "is missing (there are: q, n, none, blank, a, list, tags)"),
        ("{q}{a.b.d}", "a.b.d", "is missing (there are: c)"),
        ("{n}", "n", "is a number, expected text"),
        ("{none}", "none", "is null, expected text"),
        ("{a}", "a", "is an object, expected text"),
        ("{q.x}", "q.x", "is text, expected an object"),
        ("{a[]}", "a[]", "is an object, expected a list"),
        ("{list[2].t}", "list[2].t", "is missing (the list has 2 elements)"),
        ("Text: {blank}", "blank", "is empty"),
    ],
)
def test_template_names_the_field(template, field, reason):
    with pytest.raises(BadRecord) as caught:
        Template(template).render(RECORD)
    assert (caught.value.field, caught.value.reason) == (field, reason)


@pytest.mark.parametrize("template", ["no field", "{", "a } b", "{}", "{[0]}"])
def test_template_mistakes_are_refused(template):
    with pytest.raises(UserError, match="template"):
        Template(template)


# ---- records ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a', "is broken JSON: Unterminated string starting at at character 10"),
        (b"[1, 2]", "is a list, expected an object"),
        (b"[" * 100_000, "is broken JSON: "),
        (b'{"text": ' + b"1" * 5000 + b"}", "is broken JSON: "),
        (b'{"body": "a"}', ": field 'text' is missing (there are: body)"),
        (b'{"text": 5}', ": field 'text' is a number, expected text"),
        (b'{"text": true}', ": field 'text' is a boolean, expected text"),
        (b'{"text": " "}', ": field 'text' is empty"),
        (b'{"text": "a\\u0000b"}', ": field 'text' contains NUL"),
        (b'{"text": "a\\ud800b"}', ": field 'text' has a lone surrogate"),
        (b'{"text": "a\xffb"}', ": field 'text' is not UTF-8 (byte 0xff at 12)"),
        (b'{"other": "\xe4", "text": "a"}', " is not UTF-8 (byte 0xe4 at 12)"),
        (b'{"text": "' + b"a" * LIMIT + b'"}', " is longer than 1 MB (max_document_mb)"),
    ],
)
def test_bad_json_records_name_the_place(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "good"}\n')
    found = texts(path)
    assert [record for record, _ in found] == [0, 2, 3]
    separator = "" if expected.startswith(":") else " "
    assert found[1][1].startswith("a.jsonl, line 3" + separator + expected.lstrip(" "))
    assert (found[0][1], found[2][1]) == ("fine", "good")


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"q": "why", "a": "so"}, None),
        ({"q": " ", "a": "so"}, ": field 'q' is empty"),
        ({"q": "why", "a": ""}, ": field 'a' is empty"),
        ({"q": "why"}, ": field 'a' is missing (there are: q)"),
        ({"q": "w\0y", "a": "so"}, ": field 'q' contains NUL"),
        (
            {"q": "why", "a": "\ud800"},
            ": field 'a' has a lone surrogate, which is not valid Unicode",
        ),
    ],
)
def test_prompts_and_their_faults(tmp_path, record, fault):
    path = write_records(tmp_path / "a.jsonl", record)
    (found,) = texts(path, prompt="Q: {q}\\nA:", text=" {a}")
    assert found == (0, "Q: why\nA: so" if fault is None else f"a.jsonl, line 1{fault}")


USER, ASSISTANT = ({"role": role, "content": "c"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("chat", "fault"),
    [
        ([{"role": "system", "content": ""}, USER, ASSISTANT | {"tool_calls": None}], None),
        ("c", " is text, expected a list"),
        ([], " has no message of assistant"),
        ([USER], " has no message of assistant"),
        (["c"], "[0].role' is text, expected an object"),
        ([{"from": "gpt", "value": "c"}], "[0].role' is missing (there are: from, value)"),
        (
            [USER, ASSISTANT | {"role": "gpt"}],
            "[1].role' is 'gpt', expected one of system, developer, user, assistant, tool",
        ),
        ([USER, ASSISTANT | {"content": None}], "[1].content' is null, expected text"),
        ([USER, ASSISTANT | {"content": " "}], "[1].content' is empty"),
        ([USER | {"content": ""}, ASSISTANT], "[0].content' is empty"),
        ([USER, ASSISTANT | {"content": "\0"}], "[1].content' contains NUL"),
        (
            [USER, ASSISTANT | {"tool_calls": [{"name": "f"}]}],
            "[1]' has tool_calls, and only role and content are read",
        ),
    ],
)
def test_chats_and_their_faults(tmp_path, chat, fault):
    path = write_records(tmp_path / "a.jsonl", {"meta": {"chat": chat}})
    (found,) = texts(path, messages="meta.chat")
    if fault is None:
        assert found == (0, "\nc\nc")
    else:
        quoted = fault if "'" in fault.partition(" ")[0] else f"'{fault}"
        assert found == (0, f"a.jsonl, line 1: field 'meta.chat{quoted}")


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([1, 3], ((1, 3),)),
        ([], ()),
        ([[5, 5], [2, 4], [0, 3]], ((5, 5), (2, 4), (0, 3))),
        ([0, 5], ((0, 5),)),  # characters, not bytes
        ([0, 6], "' is [0, 6], outside the 5 characters of the text"),
        ([[0, 1], [-1, 2]], "[1]' is [-1, 2], outside the 5 characters of the text"),
        ([3, 2], "' is [3, 2], it starts behind its end"),
        ([1], "' is [1], expected [start, end], two whole numbers"),
        ([1, 2.0], "' is [1, 2.0], expected [start, end], two whole numbers"),
        ([0, True], "' is [0, True], expected [start, end], two whole numbers"),
        ([[0, 1], 2], "[1]' is 2, expected [start, end], two whole numbers"),
        ([[0, 1, 2]], "[0]' is [0, 1, 2], expected [start, end], two whole numbers"),
        ("0:3", "' is text, expected a list"),
        (None, "' is null, expected a list"),
    ],
)
def test_spans_and_their_faults(tmp_path, spans, expected):
    record = {"text": "a\u00e9\u4e2d\U0001f600z", "meta": {"s": spans}}
    one = source(write_records(tmp_path / "a.jsonl", record), signal="meta.s")
    (block,) = read_blocks([one], LIMIT)
    (found,) = read_texts(block, one, LIMIT)
    if isinstance(expected, tuple):
        assert (found.fault, found.spans) == (None, expected)
    else:
        assert found.fault == f"{tmp_path}/a.jsonl, line 1: field 'meta.s{expected}"


def test_missing_spans_name_their_field(tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"text": "abc"})
    fault = "a.jsonl, line 1: field 'body' is missing (there are: text)"
    assert texts(path, signal="body") == [(0, fault)]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.25, 0.25),
        (3, 3),
        (0, 0),
        (-0.5, "is -0.5, expected a weight from 0 to 3.4e+38, the largest float32"),
        (float("nan"), "is nan, expected a weight from 0 to 3.4e+38, the largest float32"),
        (float("inf"), "is inf, expected a weight from 0 to 3.4e+38, the largest float32"),
        (10**39, f"is {10**39}, expected a weight from 0 to 3.4e+38, the largest float32"),
        (True, "is True, expected a number"),
        ("0.5", "is '0.5', expected a number"),
        (None, "is None, expected a number"),
    ],
)
def test_weights_and_their_faults(tmp_path, weight, expected):
    one = source(write_records(tmp_path / "a.jsonl", {"text": "a", "w": weight}), token_weight="w")
    (block,) = read_blocks([one], LIMIT)
    (found,) = read_texts(block, one, LIMIT)
    if isinstance(expected, str):
        assert found.fault == f"{tmp_path}/a.jsonl, line 1: field 'w' {expected}"
    else:
        assert (found.fault, found.weight) == (None, expected)


def test_a_weight_in_a_table_of_texts_is_its_text(tmp_path):
    (tmp_path / "a.csv").write_text("text,w\na,0.5\nb,1e-3\nc,good\n")
    one = source(tmp_path / "a.csv", token_weight="w")
    found = [text for block in read_blocks([one], LIMIT) for text in read_texts(block, one, LIMIT)]
    assert [text.weight for text in found[:2]] == [0.5, 0.001]
    assert str(found[2].fault).endswith("field 'w' is 'good', expected a number")


def test_a_mask_is_counted_in_its_field_behind_a_prompt(tmp_path):
    record: dict = {"q": "Q\u4e2d", "text": "a\u00e9b", "m": [[1, 2]]}
    one = source(write_records(tmp_path / "a.jsonl", record), prompt="{q}: ", mask="m")
    (block,) = read_blocks([one], LIMIT)
    (found,) = read_texts(block, one, LIMIT)
    assert [found.text[start:end] for start, end in found.masked] == ["\u00e9"]
    record["m"] = [3, 4]
    write_records(tmp_path / "a.jsonl", record)
    (block,) = read_blocks([one], LIMIT)
    (found,) = read_texts(block, one, LIMIT)
    assert str(found.fault).endswith("field 'm' is [3, 4], outside the 3 characters of the text")


def test_noise_is_made_for_each_record(tmp_path):
    """The text that was read decides the digest; seed and record decide the noise."""
    path = tmp_path / "a.txt"
    path.write_text("the same line of text as the others\n" * 3)

    def read(**settings):
        one = source(path, document="line", **settings)
        (block,) = read_blocks([one], LIMIT)
        return list(read_texts(block, one, LIMIT))

    plain, noisy = read(), read(noise=0.6)
    for clean, text in zip(plain, noisy, strict=True):
        assert (clean.spans, clean.origin, text.origin) == (None, clean.text, clean.text)
        assert text.digest == clean.digest
        assert text.spans is not None and text.data == text.text.encode()
        assert "".join(text.text[start:end] for start, end in text.spans) == clean.text
    assert len({text.text for text in noisy}) == 3
    assert [text.text for text in read(noise=0.6)] == [text.text for text in noisy]
    other = [text.text for text in read(noise=0.6, noise_seed=1)]
    assert not {*other} & {text.text for text in noisy}
    named = [text.text for text in read(noise=0.6, name="b")]
    assert not {*named} & {text.text for text in noisy}


def test_crlf_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n \r\n{"text": "b"}')
    assert texts(path) == [(0, "a\r\n"), (2, "b")]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \r\nthree\r\n")
    assert texts(path) == [(0, "one\ntwo\n\n \nthree\n")]
    assert texts(path, document="line") == [(0, "one"), (1, "two"), (4, "three")]
    assert texts(path, document="paragraph") == [(0, "one\ntwo"), (4, "three")]


def test_bad_text_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\n\n\ntw\x00o\n\nthr\xffee\n")
    faults = [(0, "one"), (4, "a.txt, line 5: field 'text' contains NUL")]
    faults += [(6, "a.txt, line 7: field 'text' is not UTF-8 (byte 0xff at 4)")]
    assert texts(path, document="paragraph") == faults
    assert [line for line, _ in texts(path, document="line")] == [0, 4, 6]
    assert texts(path) == [(0, "a.txt: field 'text' is not UTF-8 (byte 0xff at 17)")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.json", "a.csv"])
def test_empty_file_is_a_bad_record(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert texts(tmp_path / name) == [(0, f"{name} is empty")]


@needs_data
def test_threads_with_nested_answers():
    template = "{question.title}\n\n{question.body_text}\n\n{answers[\\n\\n].body_text}"
    path = DATA / "raw" / "se_mathoverflow.net__category-theory.jsonl"
    found = texts(path, text=template)
    assert len(found) == 50
    first = json.loads(path.read_text().splitlines()[0])
    parts = [first["question"]["title"], first["question"]["body_text"]]
    parts += [answer["body_text"] for answer in first["answers"]]
    assert found[0] == (0, "\n\n".join(parts))
