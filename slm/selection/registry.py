"""Words in place of class paths: what folders say of a run, and rules of a user's own.

A configuration names classes (`_target_`), and its user composed it. What is written to disk names
none, and no module: a rule, an optimizer, a schedule, a model's builder is a word, beside plain
values,

    {"rule": "excess", "select_ratio": 0.6, "scope": "batch"}
    {"kind": "adamw", "lr": 0.001, "betas": [0.9, 0.95], ...}

so that classes may move, and a folder, which may come from anybody, has nothing to import or call.
The word is the class's name. Rules are made from their words again, by RULES; a user's own rule is
in it once its module was imported by the root key `modules` (`import_modules`). Folders that hold
class paths are read as the words they mean.
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from slm.errors import UserError
from slm.selection import purposes, rules, soft
from slm.selection.rule import Selection
from slm.store.files import Json


def word_of(name: str) -> str:
    """Of a class in the words of the configuration: ReferenceLoss -> reference_loss"""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


BUILT_IN: tuple[type[Selection], ...] = tuple(
    kind
    for module in (rules, soft, purposes)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Selection)
    if kind.__module__ == module.__name__ and kind is not soft.Soft  # what its rules share
)
RULES: dict[str, type[Selection]] = {word_of(rule.__name__): rule for rule in BUILT_IN}
# Of a run's identity: the key of a word, and the words that are ours.
KEYS = {"selection": "rule", "optimizer": "kind", "model": "kind"}
OURS = {
    "selection": set(RULES),
    "optimizer.adamw": {"adamw", "adamw8bit"},
    "optimizer.schedule": {"warmup_cosine", "warmup_stable_decay"},
    "model": {"build_lm"},
}
CALL = ("_target_", "_partial_", "_convert_", "_recursive_")  # how Hydra is to call a class


# ---- what folders say ---------------------------------------------------------------------------


def known_word(path: Any, place: str) -> str:
    """Another's class of a built-in's name keeps its path: it must not pass for that."""
    if not isinstance(path, str):
        raise UserError(f"{place}._target_ is {path!r}, it must be a class path")
    word = word_of(path.rsplit(".", 1)[-1])
    is_taken = place in OURS and word in OURS[place] and not path.startswith("slm.")
    return path if is_taken else word


def trained_word(path: Any, place: str) -> str:
    """Of what is about to be trained with: the word must mean this class alone."""
    word = known_word(path, place)
    if word == path and "." in path:
        raise UserError(f"{place}._target_ is {path}: a built-in has that name, choose another")
    if place == "selection" and word in RULES and word not in OURS[place]:
        check_rule(path, RULES[word])
    return word


def check_rule(path: str, rule: type[Selection]) -> None:
    """`modules` has this rule, perhaps under several paths."""
    module, _, name = path.rpartition(".")
    found = vars(sys.modules[module]) if module in sys.modules else {}
    if name not in found or found[name] is not rule:
        known = f"{rule.__module__}.{rule.__name__}"
        raise UserError(f"selection._target_ is {path}, and {known} has its name: rename one")


def in_words(record: Any, place: str = "", word: Callable[[Any, str], str] = known_word) -> Any:
    """A configuration, nested or flat, without class paths: words where KEYS has one.

    place: where it stands in the whole configuration; word: `known_word`, or a stricter one
    """
    if isinstance(record, list):
        return [in_words(item, place, word) for item in record]
    if not isinstance(record, Mapping):
        return record
    found: Json = {}
    for name, value in record.items():
        key = f"{place}.{name}" if place else str(name)
        above, _, last = key.rpartition(".")
        node, root = str(name).removesuffix(last), above.split(".")[0]
        if last not in CALL or f"{node}_target_" not in record:
            found[name] = in_words(value, key, word)
        elif last == "_target_" and root in KEYS:
            its_word = node + KEYS[root]
            if its_word in record:
                raise UserError(f"{key} and {its_word} are both given: no argument can be that")
            found[its_word] = word(value, above)
    return found


def by_word(selection: Mapping[str, Any]) -> Json:
    """A selection with its word in place of the class path."""
    found = in_words(selection, "selection")
    if not ("rule" in found and isinstance(found["rule"], str)):
        raise UserError(f"a selection must name its rule, found {sorted(selection)}")
    return found


def rule_word(selection: Mapping[str, Any]) -> str:
    return by_word(selection)["rule"]


def takes_all_tokens(selection: Mapping[str, Any]) -> bool:
    """`all`, or a rule that has nothing to say beside its ratio of 1."""
    record = by_word(selection)
    fields = record.keys() - {"rule", "scope", "seed"}
    ratio_of_1 = fields == {"select_ratio"} and record["select_ratio"] == 1
    return record["rule"] == "all" or ratio_of_1


def make_rule(selection: Mapping[str, Any]) -> Selection:
    """The rule that a folder names; UserError where it is not known here, or is none."""
    fields = by_word(selection)
    word = fields.pop("rule")
    if word not in RULES:
        raise UserError(
            f"no rule {word!r} is known here (there are {', '.join(RULES)}; modules=[...] imports "
            "one's own)"
        )
    for key, value in fields.items():
        if not is_plain(value):
            raise UserError(f"{key} of rule {word} is {value!r}, not a number, word or schedule")
    try:
        inspect.signature(RULES[word]).bind(**fields)
    except TypeError as error:
        raise UserError(f"rule {word} cannot have the fields {sorted(fields)}: {error}") from None
    return RULES[word](**fields)


def is_plain(value: Any) -> bool:
    """A number, a word, None, a list of them, or a schedule of such."""
    if isinstance(value, Mapping):
        return value.keys() == {"shape", "points"} and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, int | float | str)


# ---- modules of a user's own --------------------------------------------------------------------


def import_modules(names: Sequence[str]) -> None:
    """The root key `modules`: files or dotted names, before anything that they hold is needed."""
    for name in names:
        is_file = name.endswith(".py")
        register(import_file(Path(name).resolve()) if is_file else import_dotted(name))


def import_dotted(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"modules: cannot import {name} ({error})") from None


@cache
def import_file(path: Path) -> ModuleType:
    """Under its name without .py, so that `_target_: rules.Mine` finds what rules.py holds."""
    name = path.stem
    if not path.is_file():
        raise UserError(f"modules: no file {path}")
    if not name.isidentifier() or name in sys.modules or find_spec(name) is not None:
        raise UserError(f"modules: {path} cannot be imported as {name}, choose another name")
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def register(module: ModuleType) -> None:
    """Its rules, by word."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    for rule in classes:
        if issubclass(rule, Selection) and not rule.__module__.startswith("slm.selection."):
            word = word_of(rule.__name__)
            if RULES.setdefault(word, rule) is not rule:
                raise UserError(
                    f"modules: {module.__name__}.{rule.__name__} has the name of another rule, "
                    f"{word}: rename it"
                )
