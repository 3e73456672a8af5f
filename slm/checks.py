"""Keys of a command, their types and ranges: a table a command, checked before anything else.

A table has a row for every key that is read, `{"data.batch_size": whole(1)}`: what is in no row is
refused by name, since nothing would read it, and what does not fit its row is refused in one
sentence. A key that is absent (of a group that was not chosen) is not looked at; `anything` is for
what its reader checks, with all that lies below it.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm.errors import UserError, shown

ABSENT = object()
CHECKS = ("size", "full")  # of hashes, where a folder is opened
MAX_SEED = 2**32 - 1  # NumPy's


class Kind(NamedTuple):
    """What a value must be, in words and as a test."""

    wanted: str
    fits: Callable[[Any], bool]


Table = dict[str, Kind]


def is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def whole(least: int = 1, most: int = 2**63 - 1) -> Kind:
    limit = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
    return Kind(f"a whole number {limit}", lambda v: type(v) is int and least <= v <= most)


def real(low: float, high: float = math.inf, ends: str = "[]") -> Kind:
    """ends: which of the two fit themselves, as intervals are written: [], (], [), ()."""
    limit = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
    if high == math.inf:
        limit = f"of at least {low:g}" if ends[0] == "[" else f"above {low:g}"

    def fits(value: Any) -> bool:
        if not is_real(value) or not low <= value <= high:
            return False
        return not (value == low and ends[0] == "(") and not (value == high and ends[1] == ")")

    return Kind(f"a number {limit}", fits)


def word(*words: str) -> Kind:
    return Kind(f"one of {words}", lambda v: isinstance(v, str) and v in words)


def each(kind: Kind, count: int) -> Kind:
    """A list of so many of a kind."""
    return Kind(
        f"a list of {count}, each {kind.wanted}",
        lambda v: is_list(v) and len(v) == count and all(map(kind.fits, v)),
    )


def several(kind: Kind, least: int = 1) -> Kind:
    return Kind(
        f"a list of at least {least}, each {kind.wanted}",
        lambda v: is_list(v) and len(v) >= least and all(map(kind.fits, v)),
    )


def either(*kinds: Kind) -> Kind:
    wanted = ", or ".join(kind.wanted for kind in kinds)
    return Kind(wanted, lambda v: any(kind.fits(v) for kind in kinds))


def optional(kind: Kind) -> Kind:
    return either(kind, Kind("null", lambda v: v is None))


def names_folders(value: Any) -> bool:
    texts = [*value, *value.values()] if isinstance(value, Mapping) else []
    return len(texts) > 0 and all(map(text.fits, texts))


flag = Kind("true or false", lambda v: isinstance(v, bool))
text = Kind("a text that is not empty", lambda v: isinstance(v, str) and v != "")
texts = either(text, several(text))
file = Kind("a file, no folder", lambda v: text.fits(v) and not Path(v).is_dir())
folders = Kind("{name: folder, ...}, one or more", names_folders)  # with their names
section = Kind("a section of keys", lambda v: isinstance(v, Mapping))
sections = Kind(
    "{name: section, ...}",
    lambda v: isinstance(v, Mapping) and all(map(section.fits, v.values())),
)
number = Kind("a number", is_real)
seed = whole(0, MAX_SEED)
anything = Kind("anything", lambda v: True)


def check(
    settings: Mapping[str, Any], table: Table, instead: Mapping[str, str] | None = None
) -> None:
    """instead: for keys in no row that people would try, what does their work."""
    for key in keys_of(settings, table):
        check_known(key, table, instead or {})
    for key, kind in table.items():
        value = select(settings, key)
        if value is not ABSENT:
            check_value(key, value, kind)


def check_value(key: str, value: Any, kind: Kind) -> None:
    """`key` is where a user has written it."""
    if not kind.fits(value):
        raise UserError(f"{key} is {shown(value)}, it must be {kind.wanted}{as_whole(value, kind)}")


def select(settings: Any, key: str) -> Any:
    """What is at a dotted key."""
    for name in key.split("."):
        if not isinstance(settings, Mapping) or name not in settings:
            return ABSENT
        settings = settings[name]
    return settings


def as_whole(value: Any, kind: Kind) -> str:
    """1e6 is a float to YAML: how to write it where it is to be a count."""
    is_whole = isinstance(value, float) and value.is_integer() and kind.fits(int(value))
    return f", as in {int(value):_}" if is_whole else ""


def check_known(key: str, table: Table, instead: Mapping[str, str]) -> None:
    if key in table:
        return
    if inner := [row.removeprefix(f"{key}.") for row in table if row.startswith(f"{key}.")]:
        raise UserError(f"{key} has keys of its own and no value: give {', '.join(inner)} in it")
    near = difflib.get_close_matches(key, table, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    raise UserError(f"{key} is given, " + instead.get(key, f"and nothing reads it{hint}"))


def keys_of(tree: Any, table: Table, prefix: str = "") -> list[str]:
    """Dotted keys of the leaves; a key with a row is not looked into."""
    found: list[str] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        opened = isinstance(value, Mapping) and len(value) > 0 and key not in table
        found += keys_of(value, table, f"{key}.") if opened else [key]
    return found
