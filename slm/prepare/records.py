"""Records: a block of a file becomes texts, and a template says how.

`read_texts(block, source, max_bytes)` yields one `Text` for each record of a block: the template
filled in, or the sentence that names file, line and field of a bad record. It runs in the workers
of `slm prepare` and imports nothing heavy. JSON is parsed here, one record at a time, so a broken
one has a line number. Memory is one block and one record of it. A record with a prompt or with
messages becomes `parts` as well: what of it is a target; one of a source with `signal` or `noise`
has `spans`: which of its characters are signal; with `mask` those that are no targets.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from slm.prepare.chat import ChatFormat
from slm.prepare.documents import (
    BLANK_LINE,
    JSON_TYPES,
    LINE_END,
    ROLES,
    BadRecord,
    Block,
    Message,
    Part,
    Span,
    Text,
)
from slm.prepare.noise import inject, record_seed
from slm.prepare.sources import Source
from slm.prepare.template import Field, descend, look_up

BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")
LARGEST = float(np.finfo(np.float32).max)
# What a message may hold beside its content and what must not be lost without a word.
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


# ---- chats --------------------------------------------------------------------------------------


def read_messages(record: Any, field: Field, roles: tuple[str, ...]) -> list[Message]:
    """The chat in `field`; messages of `roles` are targets, one at least."""
    found = descend(record, field.steps, field, list)
    messages = [read_message(value, f"{field.name}[{i}]", roles) for i, value in enumerate(found)]
    if not any(message.role in roles for message in messages):
        raise BadRecord(f"has no message of {' or '.join(roles)}", field.name)
    return messages


def read_message(value: Any, name: str, roles: tuple[str, ...]) -> Message:
    role, content = (
        descend(value, (key,), Field(f"{name}.{key}", (key,), False)) for key in ("role", "content")
    )
    if role not in ROLES:
        raise BadRecord(f"is {role!r}, expected one of {', '.join(ROLES)}", f"{name}.role")
    if not content.strip() and role in ("user", *roles):
        raise BadRecord("is empty", f"{name}.content")
    for key in UNREAD:
        if key in value and value[key]:
            raise BadRecord(f"has {key}, and only role and content are read", name)
    return Message(role, content)


# ---- signal -------------------------------------------------------------------------------------


def read_spans(record: Any, field: Field, length: int) -> tuple[Span, ...]:
    """`[start, end]` or a list of such pairs: characters of the text, which has `length`."""
    found = descend(record, field.steps, field, list)
    if not found or isinstance(found[0], list):
        return tuple(read_span(v, f"{field.name}[{i}]", length) for i, v in enumerate(found))
    return (read_span(found, field.name, length),)


def read_span(value: Any, name: str, length: int) -> Span:
    shown = reprlib.repr(value)
    if not isinstance(value, list) or len(value) != 2 or any(type(v) is not int for v in value):
        raise BadRecord(f"is {shown}, expected [start, end], two whole numbers", name)
    start, end = value
    if start > end:
        raise BadRecord(f"is {shown}, it starts behind its end", name)
    if start < 0 or end > length:
        raise BadRecord(f"is {shown}, outside the {length} characters of the text", name)
    return start, end


# ---- numbers ------------------------------------------------------------------------------------


def read_number(record: Any, field: Field, is_text: bool) -> float:
    """is_text: a table of texts has it."""
    value = descend(record, field.steps, field, object)
    if is_text and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if type(value) not in (int, float):
        raise BadRecord(f"is {reprlib.repr(value)}, expected a number", field.name)
    return value


def read_weight(record: Any, field: Field, is_text: bool) -> float:
    """A number that a float32 holds, of at least 0."""
    value = read_number(record, field, is_text)
    if not 0 <= value <= LARGEST:
        wanted = f"a weight from 0 to {LARGEST:.3g}, the largest float32"
        raise BadRecord(f"is {value}, expected {wanted}", field.name)
    return value


def read_score(record: Any, field: Field, is_text: bool) -> float:
    value = read_number(record, field, is_text)
    if value != value:
        raise BadRecord("is nan, which is neither above nor below a bound", field.name)
    return value


# ---- block -> texts -----------------------------------------------------------------------------


def read_texts(
    block: Block, source: Source, max_bytes: int, chat: ChatFormat | None = None
) -> Iterator[Text]:
    """A chat has parts where there is a `chat` to make them, and its text everywhere."""
    for line, record, raw in split_block(block, source):
        where = block.file if block.unit is None else f"{block.file}, {block.unit} {line + 1}"
        try:
            made = to_text(raw, source, max_bytes, chat)._replace(where=where, record=record)
            yield made if source.noise is None else with_noise(made, source, source.noise)
        except BadRecord as bad:
            named = "" if bad.field is None else f": field {bad.field!r}"
            yield Text(where, record, "", b"", f"{where}{named} {bad.reason}")


def with_noise(text: Text, source: Source, share: float) -> Text:
    seed = record_seed(source.noise_seed, source.name, text.record)
    noisy, spans = inject(text.text, seed, share)
    return text._replace(text=noisy, data=noisy.encode(), spans=tuple(spans), clean=text.text)


def split_block(block: Block, source: Source) -> Iterator[tuple[int, int, Any]]:
    """(line, record, raw) of each record; blank lines hold none."""
    data, line, record = block.data, block.line, block.record
    if not isinstance(data, bytes) or not data:
        yield line, record, data
        return
    if line == 0:
        data = data.removeprefix(codecs.BOM_UTF8)
    if block.unit is None:
        yield line, record, data
        return
    paragraphs = source.document == "paragraph"
    at = 0
    for match in (BLANK_LINE if paragraphs else LINE_END).finditer(data + b"\n" * (1 + paragraphs)):
        raw = data[at : match.start()]
        blank = BLANK_LINES.match(raw)
        assert blank is not None, "the pattern also matches nothing"
        body, lead = raw[blank.end() :], blank[0].count(b"\n")
        if body.strip():
            yield line + lead, record + lead, body.rstrip(b"\r\n")
        num_lines = data.count(b"\n", at, match.end())
        line, record, at = line + num_lines, record + num_lines, match.end()


def to_text(raw: Any, source: Source, max_bytes: int, chat: ChatFormat | None) -> Text:
    """A record's document, without its place; raises BadRecord."""
    if raw is None or (isinstance(raw, bytes) and len(raw) > max_bytes):
        raise BadRecord(f"is longer than {max_bytes / 2**20:g} MB (max_document_mb)")
    if isinstance(raw, str):
        raise BadRecord(raw)
    record = raw if isinstance(raw, dict) else parse(raw, source)
    text, parts = fill(record, source, chat)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        name = blame(record, source, has_surrogate)
        csv = source.format == "csv"  # read with what is no UTF-8 as surrogates
        reason = "is not UTF-8" if csv else "has a lone surrogate, which is not valid Unicode"
        raise BadRecord(reason, name) from None
    if "\0" in text:
        raise BadRecord("contains NUL", blame(record, source, lambda value: "\0" in value))
    if len(data) > max_bytes:
        raise BadRecord(f"is longer than {max_bytes / 2**20:g} MB (max_document_mb)")
    return add_columns(Text("", 0, text, data, None, parts), record, source)


def add_columns(text: Text, record: Any, source: Source) -> Text:
    """What a source says of the document beside its text."""
    signal, mask, weight = source.signal_field, source.mask_field, source.weight_field
    if signal is not None:
        text = text._replace(spans=read_spans(record, signal, len(text.text)))
    if mask is not None:
        begin = len(text.parts[0].text) if text.parts else 0  # a prompt is another field's
        found = read_spans(record, mask, len(text.text) - begin)
        text = text._replace(masked=tuple((begin + start, begin + end) for start, end in found))
    if weight is not None:
        text = text._replace(weight=read_weight(record, weight, source.format == "csv"))
    if source.score_field is not None:
        score = read_score(record, source.score_field, source.format == "csv")
        text = text._replace(score=score)
    return text


def fill(record: Any, source: Source, chat: ChatFormat | None) -> tuple[str, tuple[Part, ...]]:
    """The text and the parts of a record."""
    if source.messages_field is not None:
        messages = read_messages(record, source.messages_field, source.roles)
        text = "\n".join(message.content for message in messages)
        try:
            return text, () if chat is None else chat.parts(messages, source.roles)
        except BadRecord as bad:
            raise BadRecord(bad.reason, source.messages) from None
    text = source.template.render(record)
    if source.prompt_template is None:
        return text, ()
    prompt = source.prompt_template.render(record)
    return prompt + text, (Part(prompt, False), Part(text, True))


def blame(record: Any, source: Source, is_bad: Callable[[str], bool]) -> str | None:
    """The first field whose text `is_bad`."""
    if source.messages_field is not None:
        messages = read_messages(record, source.messages_field, source.roles)
        bad = (i for i, message in enumerate(messages) if is_bad(message.content))
        return next((f"{source.messages}[{i}].content" for i in bad), None)
    return next((f.name for f in source.fields if is_bad(look_up(record, f))), None)


def has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def parse(raw: bytes, source: Source) -> Any:
    if not raw:
        raise BadRecord("is empty")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start + 1})"
        raise BadRecord(reason, blame_bytes(raw, source)) from None
    if source.format == "text":
        return {"text": text.replace("\r\n", "\n")}
    return parse_json(text)


def parse_json(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"is broken JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is broken JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"is {JSON_TYPES[type(record)]}, expected an object")
    return record


def blame_bytes(raw: bytes, source: Source) -> str | None:
    """The field that holds the bytes that are not UTF-8, if a field of the template does."""
    text = raw.decode(errors="surrogateescape")
    try:
        record = {"text": text} if source.format == "text" else parse_json(text)
        return blame(record, source, has_surrogate)
    except BadRecord:
        return None
