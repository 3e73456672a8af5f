"""Sources: which files are read, in which order, and how a record of them becomes a text.

`parse_sources` checks the entries of a config's `sources` or `exclude` and finds their files;
`slm.prepare.readers` reads them.
"""

import difflib
import glob
import json
import logging
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from slm.checks import Kind, check_value, real, several, text, whole, word
from slm.errors import UserError, shown
from slm.prepare.documents import BLANK_LINE, LINE_END, ROLES
from slm.prepare.noise import MAX_SHARE
from slm.prepare.scan import Scan, identify, scan_file
from slm.prepare.template import Field, Join, Template, parse_field, unescape

log = logging.getLogger(__name__)

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ("jsonl", "text", "csv", "parquet", "arrow", "hub")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".lz4")
ARCHIVES = (".zip", ".tgz", ".tbz2", ".txz", ".7z", ".rar")  # and .tar, compressed or not
DOCUMENTS = ("file", "paragraph", "line")
STRING = Kind("a text", lambda v: isinstance(v, str))
COPIES = Kind("a number above 0 (token_weight names a field with weights)", real(0, ends="()").fits)
SETTINGS = {  # the others are any text
    "path": text,  # an empty one would be the current folder
    "name": text,
    "weight": COPIES,
    "roles": several(word(*ROLES)),
    "noise": real(0, MAX_SHARE),
    "noise_seed": whole(-(2**63)),
    "format": word(*FORMATS),
    "document": word(*DOCUMENTS),
}


# ---- settings -----------------------------------------------------------------------------------


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
    document: str = "file"  # what one document of a text file is: one of DOCUMENTS
    weight: float = 1.0  # how often each document appears
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
        beside = (self.signal_field, self.mask_field, self.weight_field)
        fields = [*self.fields, *(field for field in beside if field is not None)]
        return sorted({str(field.steps[0]) for field in fields})

    @property
    def num_copies(self) -> int:
        return math.ceil(self.weight)

    @property
    def num_bytes(self) -> int | None:
        """Bytes to be read, for the progress bar; None where that is not known beforehand."""
        if self.format not in ("jsonl", "text", "csv") or any(
            f.endswith(COMPRESSED) for f in self.files
        ):
            return None
        return self.num_copies * sum(Path(file).stat().st_size for file in self.files)

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

    def cut_at(self, file: str) -> re.Pattern[bytes] | None:
        """Where a long file may be cut."""
        lines = self.format in ("jsonl", "text") and not file.endswith((*COMPRESSED, ".json"))
        return self.separator if lines and self.noise is None else None

    def plan(self) -> dict[str, Any]:
        """What must be the same for a second run to be the same run."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("path", "files")}
        settings["text"] = unescape(self.text)
        for name in ("prompt", "messages", "signal", "noise", "mask", "token_weight"):
            if settings[name] is None:
                del settings[name]
            elif name != "noise":
                settings[name] = unescape(settings[name])
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
    files, kind = find_files(entry["path"], given["format"])
    path = Path(files[0] if len(files) == 1 else entry["path"])
    given["name"] = given["name"] or (entry["path"] if kind == "hub" else name_of(path))
    if "roles" in entry:
        given["roles"] = tuple(dict.fromkeys(entry["roles"]))
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
    known = [f.name for f in fields(Source) if f.name != "files"]
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


def bare_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def format_of(path: Path) -> str | None:
    suffix = bare_suffix(path)
    return SUFFIXES[suffix] if suffix in SUFFIXES else None


def find_files(given: str, kind: str | None) -> tuple[list[Path], str]:
    """The files of a path, sorted, and their format."""
    path = Path(given).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        inside = (p for p in path.rglob("*") if not is_hidden(p.relative_to(path)))
        here = sorted(p for p in inside if p.is_file())
        found = without_leftovers([p for p in here if format_of(p) is not None])
        say_archives([p for p in here if is_archive(p)])
        files = [p for p in found if kind in (None, format_of(p))]
        say_unknown(
            given, kind, [p for p in here if format_of(p) is None and not is_archive(p)], files
        )
    elif kind == "hub" or (kind is None and looks_like_hub(given)):
        return [], "hub"
    else:
        matches = map(Path, glob.glob(str(path), recursive=True))
        files = without_leftovers([p for p in matches if p.is_file()])
    if archives := sorted(file for file in files if is_archive(file)):
        raise UserError(f"{archives[0]} is an archive, its files are not read: unpack it")
    if not files:
        wanted = "" if kind is None else f" of format {kind}"
        raise UserError(f"{given}: there is no such file, folder or glob with files{wanted}")
    kinds = sorted({str(format_of(file)) for file in files}) if kind is None else [kind]
    if kinds == ["None"]:
        raise UserError(
            f"{files[0]}: its suffix tells no format; set format ({', '.join(FORMATS)})"
        )
    if len(kinds) > 1:
        raise UserError(f"{given} holds files of several formats ({', '.join(kinds)}); set format")
    return files, kinds[0]


def is_archive(path: Path) -> bool:
    return path.suffix in ARCHIVES or bare_suffix(path) == ".tar"


def say_archives(archives: list[Path]) -> None:
    if archives:
        more = f" and {len(archives) - 1} more archives are" if archives[1:] else " is"
        log.warning("%s%s not read: unpack what belongs to the data", archives[0], more)


def say_unknown(given: str, kind: str | None, unknown: list[Path], files: list[Path]) -> None:
    """A folder of notes.md is no empty folder."""
    if not unknown:
        return
    suffixes = Counter(p.suffix for p in unknown)
    most = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))[:3]
    counts = ", ".join(f"{count} {suffix or 'without one'}" for suffix, count in most)
    how = f"{given}/**/*{most[0][0]}"
    words = (
        f"{given}: {len(unknown)} files are not read, their suffix tells no format ({counts}); "
        f"a glob with a format reads them: {{path: {how!r}, format: text}}"
    )
    if not files and kind in (None, "text"):
        raise UserError(words)
    log.warning("%s", words)


def is_hidden(path: Path) -> bool:
    """Below the folder that was named: .ipynb_checkpoints, .git, ._a.jsonl of a Mac's archive."""
    return any(part.startswith(".") for part in path.parts)


def without_leftovers(files: list[Path]) -> list[Path]:
    """Sorted, of what `datasets` wrote the data alone: a cache holds the same documents again."""
    own = {folder: dataset_files(folder) for folder in {file.parent for file in files}}
    dicts = {folder.parent / "dataset_dict.json" for folder, data in own.items() if data}
    meant = (f for f in files if f not in dicts)
    return sorted(f for f in meant if (data := own[f.parent]) is None or f in data)


def dataset_files(folder: Path) -> set[Path] | None:
    """The data of a folder that `datasets` has saved or cached; None where it is neither."""
    arrow = set(folder.glob("*.arrow"))
    if not arrow or not (folder / "dataset_info.json").is_file():
        return None
    if not (folder / "state.json").is_file():
        return {file for file in arrow if not file.name.startswith("cache-")}
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        named = {folder / row["filename"] for row in state["_data_files"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{folder / 'state.json'} names no _data_files: it is damaged") from None
    if lost := sorted(named - arrow):
        raise UserError(f"{folder / 'state.json'} names {lost[0].name}, which is not there")
    return named


def looks_like_hub(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and format_of(Path(path)) is None
