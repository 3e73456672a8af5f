"""Templates: `{question}\\n{answers[].text}` says how a record becomes a text."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from slm.errors import UserError
from slm.prepare.documents import JSON_TYPES, BadRecord


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
