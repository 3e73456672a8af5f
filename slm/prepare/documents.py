"""What flows through `slm prepare`: Block -> Message, Part, Span -> Text, or a BadRecord.

A reader cuts files into blocks, a record of a block becomes a `Text`: a document with its parts
(which of it is a target) and its spans (which of its characters are signal). They are here, below
all that makes or reads them, and import nothing of the package.
"""

import re
from hashlib import blake2b
from typing import Any, NamedTuple

LINE_END = re.compile(rb"\n")
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
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

Span = tuple[int, int]  # [start, end) characters


class Block(NamedTuple):
    """A piece of one file.

    `data` is whole lines, a whole file, a row, a text that says what is wrong, or None: too long.
    """

    source: int  # index in the list of sources
    copy: int  # the how manieth reading of the source, from 0
    file: str
    line: int  # lines (rows) of the file before it
    record: int  # lines (rows, elements, files) of the source before it
    data: bytes | dict[str, Any] | str | None
    size: int  # bytes of input
    unit: str | None = "line"  # what `line` counts, for messages; None: the file is one record
    count: int = 1  # lines (rows, elements, files) that it has


class Message(NamedTuple):
    role: str
    content: str


class Part(NamedTuple):
    """A piece of a document; the EOS that ends the document counts to its last part."""

    text: str
    is_target: bool
    special: int | None = None  # the id of the special token that this is; it has no text


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
    masked: tuple[Span, ...] = ()  # of what in `text` is no target
    score: float | None = None  # of its quality, where its record has one (slm.prepare.keep)
    weight: float = 1.0  # of its tokens' losses, a float32; 0: none of them is a target

    @property
    def origin(self) -> str:
        """What was read: it decides what is evaluation text."""
        return self.text if self.clean is None else self.clean

    @property
    def digest(self) -> bytes:
        """Of what was read: copies fall on one side, whatever noise each has."""
        data = self.data if self.clean is None else self.clean.encode()
        return blake2b(data, digest_size=16).digest()


class BadRecord(Exception):
    """One record that cannot be a document: why, and in which field where that is known."""

    def __init__(self, reason: str, field: str | None = None):
        super().__init__(reason)
        self.reason, self.field = reason, field
