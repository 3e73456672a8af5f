"""Records: a block of a file becomes texts, and a template says how.

`read_texts(block, source, max_bytes)` yields one `Text` for each record of a block: the template
filled in, or the sentence that names file, line and field of a bad record. It runs in the workers
of `slm prepare` and imports nothing heavy. JSON is parsed here, one record at a time, so a broken
one has a line number. Memory is one block and one record of it. A record with a prompt or with
messages becomes `parts` as well: what of it is a target; one of a source with `signal` or `noise`
has `spans`: which of its characters are signal.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from slm.errors import UserError
from slm.noise import inject, record_seed
from slm.parts import Part
from slm.spans import Span

if TYPE_CHECKING:  # sources.py needs `Template`, chat.py `BadRecord`
    from slm.chat import ChatFormat
    from slm.readers import Block
    from slm.sources import Source

LINE_END = re.compile(rb"\n")
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# What a message may hold beside its content and what must not be lost without a word.
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class BadRecord(Exception):
    """One record that cannot be a document: why, and in which field where that is known."""

    def __init__(self, reason: str, field: str | None = None):
        super().__init__(reason)
        self.reason, self.field = reason, field


# ---- templates ----------------------------------------------------------------------------------


class Join(NamedTuple):
    """The step `[separator]` of a path: every element of a list, joined."""

    separator: str


class Field(NamedTuple):
    name: str  # as written
    steps: tuple[str | int | Join, ...]
    as_text: bool  # `!s`: a number becomes text


def unescape(text: str) -> str:
    """`\\n` and `\\t` typed in a shell or in single quotes are meant as line end and tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def parse_field(name: str) -> Field:
    """`question.tags[, ]` -> ("question", "tags", Join(", ")); `[]` joins by a line end."""
    path, as_text = name.removesuffix("!s"), name.endswith("!s")
    tokens = re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path)
    steps: list[str | int | Join] = []
    for key, bracket in tokens:
        if key:
            steps.append(key)
        elif bracket.isdigit():
            steps.append(int(bracket))
        else:
            steps.append(Join(unescape(bracket) or "\n"))
    if not steps or not isinstance(steps[0], str):
        raise UserError(f"{{{name}}} in a template names no field")
    return Field(path, tuple(steps), as_text)


class Template:
    """`{question}\\n{answers[].text}`: how a record becomes a text; `{{` and `}}` are braces."""

    def __init__(self, text: str):
        self.pieces: list[str | Field] = []
        at = 0
        for match in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]", text):
            self.pieces.append(unescape(text[at : match.start()]))
            at = match.end()
            if match[0] in ("{{", "}}"):
                self.pieces.append(match[0][0])
            elif match[1] is None:
                raise UserError(
                    f"template {text!r}: a single {match[0]} (double it to mean a brace)"
                )
            else:
                self.pieces.append(parse_field(match[1]))
        self.pieces.append(unescape(text[at:]))
        self.fields = [piece for piece in self.pieces if isinstance(piece, Field)]
        if not self.fields:
            raise UserError(f"template {text!r} has no field: write {{text}} for the field text")

    @property
    def is_one_field(self) -> bool:
        """Is the text a field as it stands, its characters those of the record?"""
        steps = self.fields[0].steps
        return [*filter(None, self.pieces)] == self.fields[:1] and Join not in map(type, steps)

    def render(self, record: Any) -> str:
        values = [p if isinstance(p, str) else look_up(record, p) for p in self.pieces]
        if not any(v.strip() for v, p in zip(values, self.pieces, strict=True) if p in self.fields):
            raise BadRecord("is empty", self.fields[0].name)
        return "".join(values)


def look_up(record: Any, field: Field) -> str:
    return descend(record, field.steps, field)


def descend(value: Any, steps: tuple[str | int | Join, ...], field: Field, kind: type = str) -> Any:
    for i, step in enumerate(steps):
        expect(value, dict if isinstance(step, str) else list, field)
        if isinstance(step, Join):
            return step.separator.join(descend(v, steps[i + 1 :], field) for v in value)
        if isinstance(step, str) and step not in value:
            raise BadRecord(f"is missing (there are: {', '.join(value) or 'none'})", field.name)
        if isinstance(step, int) and step >= len(value):
            raise BadRecord(f"is missing (the list has {len(value)} elements)", field.name)
        value = value[step]
    if field.as_text and type(value) in (int, float):
        return str(value)
    return expect(value, kind, field)


def expect(value: Any, kind: type, field: Field) -> Any:
    if not isinstance(value, kind):
        found = JSON_TYPES[type(value)] if type(value) in JSON_TYPES else type(value).__name__
        raise BadRecord(f"is {found}, expected {JSON_TYPES[kind]}", field.name)
    return value


# ---- chats --------------------------------------------------------------------------------------


class Message(NamedTuple):
    role: str
    content: str


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


# ---- block -> texts -----------------------------------------------------------------------------


class Text(NamedTuple):
    """One document, or the reason why it is none."""

    where: str  # file and line, for messages
    record: int
    text: str  # prompt and answer; the contents of a chat, whatever the template
    data: bytes  # the text in UTF-8
    fault: str | None  # a sentence with the place
    parts: tuple[Part, ...] = ()  # none: one text, all of it targets
    spans: tuple[Span, ...] | None = None  # of the signal in `text`; None: nobody knows
    clean: str | None = None  # the text before noise was injected, where it was

    @property
    def origin(self) -> str:
        """What was read: it decides what is evaluation text."""
        return self.text if self.clean is None else self.clean

    @property
    def digest(self) -> bytes:
        """Of what was read: copies fall on one side, whatever noise each has."""
        data = self.data if self.clean is None else self.clean.encode()
        return blake2b(data, digest_size=16).digest()


def read_texts(
    block: Block, source: Source, max_bytes: int, chat: ChatFormat | None = None
) -> Iterator[Text]:
    """A chat has parts where there is a `chat` to make them, and its text everywhere."""
    for line, record, raw in split_block(block, source):
        where = block.file if block.unit is None else f"{block.file}, {block.unit} {line + 1}"
        try:
            text, data, parts, spans = to_text(raw, source, max_bytes, chat)
            made = Text(where, record, text, data, None, parts, spans)
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


def to_text(
    raw: Any, source: Source, max_bytes: int, chat: ChatFormat | None
) -> tuple[str, bytes, tuple[Part, ...], tuple[Span, ...] | None]:
    """A record's text, its UTF-8, its parts and its signal; raises BadRecord."""
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
    signal = source.signal_field
    spans = None if signal is None else read_spans(record, signal, len(text))
    return text, data, parts, spans


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
