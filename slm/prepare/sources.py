"""Sources: which files are read, in which order, and how a record of them becomes a text.

`parse_sources` checks the entries of a config's `sources` or `exclude` and finds their files;
`slm.prepare.readers` reads them.
"""

import difflib
import logging
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from slm.checks import Kind, check_value, real, several, text, whole, word
from slm.errors import UserError, shown
from slm.prepare.documents import BLANK_LINE, LINE_END, ROLES
from slm.prepare.noise import MAX_SHARE
from slm.prepare.parquet import row_groups
from slm.prepare.places import (
    COMPRESSED,
    FORMATS,
    SUFFIXES,
    find_files,
    find_urls,
    is_url,
    state_of,
)
from slm.prepare.scan import Cut, Scan, identify, scan_file
from slm.prepare.template import Field, Join, Template, parse_field, unescape

log = logging.getLogger(__name__)

DOCUMENTS = ("file", "paragraph", "line")
STRING = Kind("a text", lambda v: isinstance(v, str))
COPIES = Kind("a number above 0 (token_weight names a field with weights)", real(0, ends="()").fits)
LONG = Kind(
    "{over: tokens, times: a number above 0}",
    lambda v: (
        isinstance(v, dict)
        and v.keys() == {"over", "times"}
        and whole(1).fits(v["over"])
        and COPIES.fits(v["times"])
    ),
)
SETTINGS = {  # the others are any text
    "path": text,  # an empty one would be the current folder
    "name": text,
    "weight": COPIES,
    "min_tokens": whole(1),
    "weight_long": LONG,
    "roles": several(word(*ROLES)),
    "noise": real(0, MAX_SHARE),
    "noise_seed": whole(-(2**63)),
    "format": word(*FORMATS),
    "document": word(*DOCUMENTS),
}


# ---- settings -----------------------------------------------------------------------------------


class Long(NamedTuple):
    """What long documents weigh."""

    over: int  # of more tokens than that, EOS included
    times: float  # the source's weight


@dataclass(frozen=True)
class Source:
    """One entry of `sources` or `exclude`; what has no default is found where it is not given."""

    path: str  # a file, a folder, a glob, or a name on the hub
    name: str  # in the manifest and the report: the path's stem
    format: str  # one of FORMATS: by suffix
    files: tuple[str, ...]
    text: str = "{text}"  # the template; a line or a file of text is the field `text`
    prompt: str | None = None  # a template too: what stands before the text and is no target
    messages: str | None = None  # instead of both: the field with a list of {role, content}
    roles: tuple[str, ...] = ("assistant",)  # whose messages are targets
    signal: str | None = None  # the field with the spans of the text that are signal
    noise: float | None = None  # instead: share of the documents' characters that is injected
    noise_seed: int = 0
    mask: str | None = None  # the field with the spans of the text that are no targets
    token_weight: str | None = (
        None  # the field with what the losses of a document are multiplied by
    )
    score: str | None = None  # the field with its quality; set by slm.prepare.keep for all sources
    document: str = "file"  # what one document of a text file is: one of DOCUMENTS
    weight: float = 1.0  # how often each document appears
    weight_long: Long | None = None  # long ones more or less often than that
    min_tokens: int = 0  # shorter documents are left out; EOS is counted
    subset: str | None = None  # of a data set on the hub
    split: str = "train"
    revision: str | None = None

    @cached_property
    def template(self) -> Template:
        return Template(self.text)

    @cached_property
    def prompt_template(self) -> Template | None:
        return None if self.prompt is None else Template(self.prompt)

    @cached_property
    def messages_field(self) -> Field | None:
        return None if self.messages is None else parse_field(self.messages)

    @cached_property
    def signal_field(self) -> Field | None:
        return None if self.signal is None else parse_field(self.signal)

    @cached_property
    def mask_field(self) -> Field | None:
        return None if self.mask is None else parse_field(self.mask)

    @cached_property
    def weight_field(self) -> Field | None:
        return None if self.token_weight is None else parse_field(self.token_weight)

    @cached_property
    def score_field(self) -> Field | None:
        return None if self.score is None else parse_field(self.score)

    @property
    def has_signal(self) -> bool:
        return self.signal is not None or self.noise is not None

    @property
    def has_prompts(self) -> bool:
        return self.prompt is not None or self.messages is not None

    @property
    def has_masks(self) -> bool:
        return self.has_prompts or self.mask is not None

    @property
    def by_need(self) -> set[str]:
        """The columns of a corpus that it asks for (slm.store.shards.BY_NEED)."""
        asked = {"masks": self.has_masks, "signal": self.has_signal}
        asked["weights"] = self.token_weight is not None
        return {name for name, is_asked in asked.items() if is_asked}

    @property
    def fields(self) -> list[Field]:
        """What a record's text is made of."""
        if self.messages_field is not None:
            return [self.messages_field]
        prompt = [] if self.prompt_template is None else self.prompt_template.fields
        return prompt + self.template.fields

    @property
    def columns(self) -> list[str]:
        """What is read of a table."""
        beside = (self.signal_field, self.mask_field, self.weight_field, self.score_field)
        fields = [*self.fields, *(field for field in beside if field is not None)]
        return sorted({str(field.steps[0]) for field in fields})

    @property
    def long_over(self) -> float:
        """Infinite where no document counts as long."""
        return math.inf if self.weight_long is None else self.weight_long.over

    def weight_of(self, num_tokens: int) -> float:
        long = self.weight_long
        return self.weight * (1 if long is None or num_tokens <= long.over else long.times)

    @property
    def largest_weight(self) -> float:
        return self.weight * max(1, 0 if self.weight_long is None else self.weight_long.times)

    @property
    def num_copies(self) -> int:
        return math.ceil(self.largest_weight)

    @property
    def num_bytes(self) -> int | None:
        """Bytes to be read, for the progress bar; None where that is not known beforehand."""
        if self.format not in ("jsonl", "text", "csv") or any(
            f.endswith(COMPRESSED) for f in self.files
        ):
            return None
        return self.num_copies * sum(state_of(file).size for file in self.files)

    @property
    def separator(self) -> re.Pattern[bytes] | None:
        """Between the records of its files of lines; None where each is one."""
        if self.format == "text" and self.document == "file":
            return None
        return BLANK_LINE if self.document == "paragraph" else LINE_END

    @cached_property
    def scans(self) -> dict[str, Scan]:
        """What was seen of each file, once, before any is read."""
        return {file: scan_file(file, self.cut_at(file)) for file in self.files}

    def cut_at(self, file: str) -> re.Pattern[bytes] | Callable[[str], list[Cut]] | None:
        """Where a long file may be cut; noise is drawn by a record's number in the source."""
        if self.noise is not None:
            return None
        if self.format == "parquet":
            return row_groups
        lines = self.format in ("jsonl", "text") and not file.endswith((*COMPRESSED, ".json"))
        return self.separator if lines else None

    def plan(self) -> dict[str, Any]:
        """What must be the same for a second run to be the same run."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("path", "files", "score")}
        settings["text"] = unescape(self.text)
        for name in ("prompt", "messages", "signal", "noise", "mask", "token_weight"):
            if settings[name] is None:
                del settings[name]
            elif name != "noise":
                settings[name] = unescape(settings[name])
        if self.weight_long is None:
            del settings["weight_long"]
        else:
            settings["weight_long"] = self.weight_long._asdict()
        if not self.min_tokens:
            del settings["min_tokens"]
        if self.noise is None:
            del settings["noise_seed"]
        settings["roles"] = list(self.roles)
        if self.messages is None:
            del settings["roles"]
        named = {"path": self.path} if self.format == "hub" else identify(self.scans.values())
        return settings | named


def parse_sources(entries: Any, key: str) -> list[Source]:
    """Check the entries of the config key `key` and find their files."""
    if not isinstance(entries, list):
        raise UserError(
            f"{key} must be a list, as in {key}=[{{path: a.jsonl}}], found {shown(entries)}"
        )
    sources = [parse_source(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: two entries have the name {name!r}; set name")
    return sources


def parse_source(entry: Any, key: str) -> Source:
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError(f"{key} must have a path, found {shown(entry)}")
    check_settings(entry, key)
    given: dict[str, Any] = {"name": None, "format": None} | entry
    find = find_urls if is_url(entry["path"]) else find_files
    files, kind = find(entry["path"], given["format"])
    path = Path(files[0] if len(files) == 1 else entry["path"])
    given["name"] = given["name"] or (entry["path"] if kind == "hub" else name_of(path))
    if "roles" in entry:
        given["roles"] = tuple(dict.fromkeys(entry["roles"]))
    if "weight_long" in entry:
        given["weight_long"] = Long(**given["weight_long"])
    source = Source(**given | {"format": kind, "files": tuple(map(str, files))})
    if kind != "text" and source.document != "file":
        raise UserError(f"{key}.document is for text files, {source.path} is {kind}")
    for name in ("messages", "signal", "mask", "token_weight"):
        if name in entry and kind == "text":
            raise UserError(f"{key}.{name} is for records, {source.path} is {kind}")
    if kind != "hub" and not {"subset", "split", "revision"}.isdisjoint(entry):
        raise UserError(
            f"{key}: subset, split and revision are for the hub, {source.path} is {kind}"
        )
    return source


def name_of(path: Path) -> str:
    """A file's without its suffixes; of a glob that names none, `texts/**/*.md`, the folder's."""
    stem = "*" if path.name.startswith("*.") else path.name
    while Path(stem).suffix in (*SUFFIXES, *COMPRESSED):
        stem = Path(stem).stem
    return name_of(path.parent) if not stem.strip("*?") and path.parent.name else stem


def check_settings(entry: dict[str, Any], key: str) -> None:
    """The names, types and values of what the user wrote."""
    known = [f.name for f in fields(Source) if f.name not in ("files", "score")]
    for name, value in entry.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"{key} has an unknown setting {name!r}{hint} ({', '.join(known)})")
        check_value(f"{key}.{name}", value, SETTINGS[name] if name in SETTINGS else STRING)
        if name in ("text", "prompt"):
            Template(value)
    check_messages(entry, key)
    check_signal(entry, key)


def check_messages(entry: dict[str, Any], key: str) -> None:
    if "messages" not in entry:
        if "roles" in entry:
            raise UserError(f"{key}.roles is {entry['roles']!r}, and {key}.messages is not set")
        return
    for name in ("text", "prompt"):
        if name in entry:
            raise UserError(
                f"{key} has both messages and {name}: a chat has no template of its own"
            )
    if any(isinstance(step, Join) for step in parse_field(entry["messages"]).steps):
        raise UserError(f"{key}.messages is {entry['messages']!r}, it must name a list: a.b or a")


def check_signal(entry: dict[str, Any], key: str) -> None:
    """Labels are of a text that stands in one field, or of noise that is made here."""
    for name in ("signal", "noise"):
        for other in ("prompt", "messages"):
            if name in entry and other in entry:
                raise UserError(f"{key} has both {name} and {other}: labels are for plain text")
    if "noise" in entry:
        if "signal" in entry:
            raise UserError(f"{key} has both signal and noise: noise makes the labels itself")
    elif "noise_seed" in entry:
        raise UserError(f"{key}.noise_seed is {entry['noise_seed']!r}, and {key}.noise is not set")
    for name in ("messages", "noise"):
        if "mask" in entry and name in entry:
            raise UserError(f"{key} has both mask and {name}: masks count characters of a field")
    for name in ("signal", "mask"):
        if name in entry:
            check_spans(entry, f"{key}.{name}", entry[name], key)


def check_spans(entry: dict[str, Any], name: str, field: str, key: str) -> None:
    """The spans of `field` are of a text that stands in one field."""
    if any(isinstance(step, Join) for step in parse_field(field).steps):
        raise UserError(f"{name} is {field!r}, it must name a list: a.b or a")
    if "text" in entry and not Template(entry["text"]).is_one_field:
        raise UserError(
            f"{name} counts the characters of one field, and {key}.text is "
            f"{entry['text']!r}; it must be a field alone, as in {{text}}"
        )
