"""What a record from a disk must hold before anything in it is believed: names, types and ranges.

    check_fields(path, record, {"seq_len": SIZE, "packing": one_of("concat", "documents")})

A manifest comes from anybody's disk. A field that is missing or is another thing than expected is
one sentence with the file, the field and its value; what names a file names it in that folder.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slm.errors import UserError, shown

COLUMN_NAME = re.compile(r"[a-z_]+")
DIGEST = re.compile(r"[0-9a-f]{64}")
DTYPES = (
    "bool",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
)


class Field(NamedTuple):
    """What a value must be, in words and as a test."""

    wanted: str
    fits: Callable[[Any], bool]


def whole_number(low: int) -> Field:
    """That an array on a disk can have as an index or a size."""

    def fits(value: Any) -> bool:
        return type(value) is int and low <= value < 2**48

    return Field(f"a whole number of at least {low}", fits)


def one_of(*known: str | int) -> Field:
    return Field(f"one of {', '.join(map(str, known))}", lambda value: value in known)


def mapping(key: Field, value: Field) -> Field:
    def fits(found: Any) -> bool:
        if not isinstance(found, dict):
            return False
        return all(key.fits(name) and value.fits(item) for name, item in found.items())

    return Field(f"an object: {key.wanted} -> {value.wanted}", fits)


def list_of(item: Field) -> Field:
    def fits(found: Any) -> bool:
        return isinstance(found, list) and all(map(item.fits, found))

    return Field(f"a list of {item.wanted}", fits)


def optional(field: Field) -> Field:
    return Field(f"{field.wanted} or null", lambda value: value is None or field.fits(value))


def is_file_name(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    return value == Path(value).name and value not in ("", "..")


INDEX, SIZE = whole_number(0), whole_number(1)
TEXT = Field("text", lambda value: isinstance(value, str))
NUMBER = Field("a number of at least 0", lambda v: type(v) in (int, float) and 0 <= v < math.inf)
OBJECT = Field("an object", lambda value: isinstance(value, dict))
SHA256 = Field(
    "a sha256", lambda value: isinstance(value, str) and DIGEST.fullmatch(value) is not None
)
COLUMN = Field("a column's name", lambda value: COLUMN_NAME.fullmatch(value) is not None)
DTYPE = one_of(*DTYPES)
FILE = Field("a file's name", is_file_name)  # in the folder of the record
FILES = mapping(FILE, SHA256)
CHECKPOINT = {"sha256": SHA256, "step": INDEX, "tokens_seen": INDEX}


# Fields whose values are hashes: of what, and what makes them agree.
OF_TOKENIZER = (
    "what maps text to ids: vocabulary, merges, normalizer, EOS",
    "prepare both with one tokenizer (tokenizer.path)",
)
OF_CORPUS = (
    "the corpus: its tokenizer, window length, packing and every shard",
    "the text, its order or its preparation is another",
)
OF_SCORES = ("the scores and the corpus they are of", "they were made anew, or of another corpus")
OF_MODEL = ("the model's config and its weights", "its folder was trained or saved again")
HASHED = {
    "tokenizer_sha256": OF_TOKENIZER,
    "tokenizer.sha256": OF_TOKENIZER,
    "tokenizer.chat_template_sha256": ("the chat template", "its file or the tokenizer's differs"),
    "corpus": OF_CORPUS,
    "corpus_fingerprint": OF_CORPUS,
    "references": OF_SCORES,
    "init_from": OF_MODEL,
    "online_reference": OF_MODEL,
    "model_sha256": OF_MODEL,
    "files_sha256": ("the names and contents of the source's files", "a file was changed"),
    "windows_sha256": ("the numbers of the windows", "num_targets, seed or by_source is another"),
}


def of_what(field: str, *values: object) -> str:
    """To stand behind two values of a field that differ: if they are hashes, of what, and why."""
    known = field if field in HASHED else field.rpartition(".")[2]
    if known not in HASHED or DIGEST.search(str(values)) is None:
        return ""
    what, why = HASHED[known]
    return f" (a hash of {what}; {why})"


def check_fields(path: Path, record: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """`path` is the file that holds the record."""
    for name, field in fields.items():
        if name not in record:
            raise UserError(f"{path} is damaged: it has no {name!r}")
        if not field.fits(record[name]):
            raise UserError(f"{path}: {name} is {shown(record[name])}, expected {field.wanted}")
