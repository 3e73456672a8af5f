"""Chats: a list of {role, content} through the tokenizer's chat template, cut into parts.

The template is rendered as `apply_chat_template` renders it. Special tokens that it sets become
their ids; one that is spelled in a content stays text. Targets are the messages of some roles:

- from where the generation prompt ends (which is what the model is given) to the end of the turn,
  its special token included, since the model must learn to stop;
- or what the template marks with {% generation %}, where it does and only `assistant` is asked for.

EOS ends the document, as everywhere; one that the template sets there is that EOS, not a second.
jinja2 is imported on first use: only chats need it. A chat is rendered once, and up to each of its
targets once more.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm.errors import UserError
from slm.prepare.documents import BadRecord, Message, Part, Span
from slm.store.tokenizer import first_line

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# For tokenizers that have none: no token of its own, and EOS ends the assistant's turn.
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{{ '<|' + message.role + '|>\\n' + message.content }}
{%- if message.role == 'assistant' %}
{{ eos_token }}
{%- endif %}
{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' }}
{%- endif %}
"""
# Marks that pass through a template unseen; Unicode says that they are no characters.
END = "\ufdd0"  # behind the last visible character of a target's content
ESCAPE = "\ufdd1"  # inside what would be a special token
OPEN, CLOSE = "\ufdd2", "\ufdd3"  # where {% generation %} begins and ends
NO_MARKS = dict.fromkeys(map(ord, (END, ESCAPE, OPEN, CLOSE)))
NO_GENERATION = dict.fromkeys(map(ord, (OPEN, CLOSE)))


# ---- the template -------------------------------------------------------------------------------


class Special(NamedTuple):
    """A special token: its id, and whether it swallows the white space beside it."""

    id: int
    lstrip: bool
    rstrip: bool


def find_template(tokenizer: PreTrainedTokenizerFast | None, file: str | None) -> str:
    """The file's, else the tokenizer's own, else DEFAULT_TEMPLATE; its syntax is right."""
    if file is not None:
        template, origin = read_template(Path(file).expanduser()), file
    elif tokenizer is None or tokenizer.chat_template is None:
        template, origin = DEFAULT_TEMPLATE, "slm's own"
        log.info("the tokenizer has no chat template: <|role|>, content, EOS after the assistant's")
    else:
        template, origin = own_template(tokenizer), "that of the tokenizer"
    check_template(template, origin)
    return template


def own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several, and none of them is the default
        raise UserError(
            f"the tokenizer's chat template: {first_line(error)}; set tokenizer.chat_template"
        ) from None


def read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template is {file}, it cannot be read: {error}") from None


def check_template(template: str, origin: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        compile_template(template)
    except TemplateSyntaxError as error:
        raise UserError(f"chat template, {origin}, line {error.lineno}: {error.message}") from None


def compile_template(template: str) -> jinja2.Template:
    """As transformers does, but without the date: the same chat gives the same bytes every day."""
    import json

    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            first, last = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
            return [first, *body, last]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse  # type: ignore
    return environment.from_string(template)


# ---- messages -> parts --------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer's way with chats; small enough to be sent to a worker process."""

    template: str
    special: dict[str, Special]
    variables: dict[str, str]  # bos_token, eos_token, ...
    eos_id: int

    @cached_property
    def compiled(self) -> jinja2.Template:
        return compile_template(self.template)

    @cached_property
    def any_special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))

    @cached_property
    def end_of_turn(self) -> re.Pattern[str]:
        return re.compile(rf"{END}\s*({self.any_special.pattern})")

    def parts(self, messages: list[Message], roles: tuple[str, ...]) -> tuple[Part, ...]:
        """The document, its end in the last part; raises BadRecord."""
        marked = [self.mark(message, message.role in roles) for message in messages]
        text = self.render(marked, False)
        if OPEN in text and roles == ("assistant",):
            spans = [m.span() for m in re.finditer(f"{OPEN}.*?{CLOSE}", text, re.DOTALL)]
        else:
            text = text.translate(NO_GENERATION)
            spans = self.find_turns(text, marked, roles)
        return self.close(list(self.cut(text, spans)), messages[-1].role in roles)

    def mark(self, message: Message, is_target: bool) -> Message:
        """The content with ESCAPE in what looks like a special token, and END in a target."""
        content = message.content
        if content != content.translate(NO_MARKS):
            raise BadRecord("has a message with U+FDD0 to U+FDD3, which are no characters")
        content = self.any_special.sub(lambda m: m[0][:1] + ESCAPE + m[0][1:], content)
        if is_target:
            visible = content.rstrip()
            content = visible + END + content[len(visible) :]
        return message._replace(content=content)

    def render(self, messages: list[Message], generate: bool) -> str:
        try:
            return self.compiled.render(
                messages=[message._asdict() for message in messages],
                add_generation_prompt=generate,
                tools=None,
                documents=None,
                **self.variables,
            )
        # A template is a program of somebody else's: any of Python's errors may come out of it.
        except Exception as error:
            raise BadRecord(f"is refused by the chat template: {first_line(error)}") from None

    def head(self, messages: list[Message], generate: bool) -> str:
        """What the template makes of the first messages; nothing where it refuses them alone."""
        try:
            return self.render(messages, generate).translate(NO_GENERATION)
        except BadRecord:
            return ""

    # ---- which characters are targets ----

    def find_turns(self, text: str, marked: list[Message], roles: tuple[str, ...]) -> list[Span]:
        targets = [i for i, message in enumerate(marked) if message.role in roles]
        ends = [match.start() for match in re.finditer(END, text)]
        if len(ends) != len(targets):
            raise BadRecord(
                f"has {len(targets)} messages of {' or '.join(roles)}, the chat template shows "
                f"{len(ends)}"
            )
        return [
            (self.turn_start(text, end, marked, i), self.turn_end(text, end, marked, i))
            for i, end in zip(targets, ends, strict=True)
        ]

    def turn_start(self, text: str, end: int, marked: list[Message], i: int) -> int:
        """Where the generation prompt ends; the content's first character where none is there."""
        head = self.head(marked[:i], True) if marked[i].role == "assistant" else ""
        if head and text.startswith(head) and len(head) <= end:
            return len(head)
        content = marked[i].content.partition(END)[0]
        for shown in (content, content.lstrip()):
            if text[:end].endswith(shown):
                return end - len(shown)
        raise BadRecord(
            f"has message {i + 1} in other words after the chat template; mark what is a target "
            "with {% generation %} in a template of your own (tokenizer.chat_template)"
        )

    def turn_end(self, text: str, end: int, marked: list[Message], i: int) -> int:
        """Behind the special token that ends the turn; without one, where the turn's text ends."""
        match = self.end_of_turn.match(text, end)
        if match is not None:
            return match.end()
        whole = self.head(marked[: i + 1], False)
        return len(whole) if whole and text.startswith(whole) else end

    # ---- text -> parts ----

    def cut(self, text: str, spans: list[Span]) -> Iterator[Part]:
        """Parts that end at special tokens and at the ends of the spans."""
        borders = chain(*spans, *(match.span() for match in self.any_special.finditer(text)))
        strip = False
        for start, end in pairwise(sorted({0, len(text), *borders})):
            live = any(first <= start < last for first, last in spans)
            piece = text[start:end]
            if piece in self.special:
                yield Part("", live, self.special[piece].id)
                strip = self.special[piece].rstrip
                continue
            piece = piece.translate(NO_MARKS)
            piece = piece.lstrip() if strip else piece
            following = self.any_special.match(text, end)
            if following is not None and self.special[following[0]].lstrip:
                piece = piece.rstrip()
            if piece:
                yield Part(piece, live)
                strip = False

    def close(self, parts: list[Part], ends_with_target: bool) -> tuple[Part, ...]:
        """Leave the last (empty) part to EOS, instead of one that the template has put there."""
        last = len(parts)
        while last and parts[last - 1].special is None and not parts[last - 1].text.strip():
            last -= 1
        if last and parts[last - 1].special == self.eos_id:
            return (*parts[: last - 1], Part("", parts[last - 1].is_target))
        return (*parts, Part("", ends_with_target))


def chat_format(tokenizer: PreTrainedTokenizerFast) -> ChatFormat:
    """Of a tokenizer that has a chat template."""
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    assert isinstance(eos, str) and isinstance(eos_id, int), f"one EOS token, found {eos!r}"
    special = {eos: Special(eos_id, False, False)} | {
        token.content: Special(index, token.lstrip, token.rstrip)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    variables = dict(tokenizer.special_tokens_map)
    return ChatFormat(tokenizer.get_chat_template(), special, variables, eos_id)


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token that ends an answer and is a target; None where EOS does, or no template.

    Read off a chat of one question and one answer, as `slm prepare` cuts it.
    """
    if tokenizer.chat_template is None:
        return None
    chat = [Message("user", "Question?"), Message("assistant", "Answer.")]
    try:
        parts = chat_format(tokenizer).parts(chat, ("assistant",))
    except (BadRecord, ValueError):  # the template wants another chat; several, none the default
        return None
    ends = [part.special for part in parts if part.is_target and part.special is not None]
    return ends[-1] if ends else None
