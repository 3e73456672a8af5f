"""Selection rules by word: what folders say of a rule, and rules of a user's own.

A configuration names a rule's class (`_target_`), and its user composed it. A folder may come from
anybody, so it holds a word and plain values,

    {"rule": "excess", "select_ratio": 0.6, "scope": "batch"}

the word is looked up in RULES, and nothing that a folder says is imported or called. A user's own
rule is in RULES once its module was imported by the root key `modules` (`import_modules`); folders
that hold a class path are read through the same table.
"""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from slm import selection as ours
from slm.errors import UserError
from slm.selection import Selection
from slm.shards import Json


def word_of(name: str) -> str:
    """Of a class in the words of the configuration: ReferenceLoss -> reference_loss"""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


BUILT_IN: tuple[type[Selection], ...] = (
    *(ours.All, ours.Excess, ours.Random, ours.Loss, ours.ReferenceLoss, ours.ReferenceEntropy),
    *(ours.Intersection, ours.Union, ours.Middle, ours.Sigmoid, ours.Softmax, ours.Relu),
    ours.Mixture,
)
RULES: dict[str, type[Selection]] = {word_of(rule.__name__): rule for rule in BUILT_IN}
WORDS = {f"slm.selection.{rule.__name__}": word_of(rule.__name__) for rule in BUILT_IN}


# ---- what folders say ---------------------------------------------------------------------------


def by_word(record: Mapping[str, Any], prefix: str = "") -> Json:
    """A selection with its word in place of the class path; `prefix` where its keys have one."""
    rest = dict(record)
    path, word = f"{prefix}_target_", f"{prefix}rule"
    if path in rest:
        if word in rest:
            raise UserError(f"{path} and {word} are both given: no field of a rule can be `rule`")
        rest[word] = known_word(rest.pop(path))
    if prefix == "" and not ("rule" in rest and isinstance(rest["rule"], str)):
        raise UserError(f"a selection must name its rule, found {sorted(record)}")
    return rest


def known_word(path: Any) -> str:
    """Another's class of a built-in rule's name keeps its path: it must not pass for that rule."""
    if not isinstance(path, str):
        raise UserError(f"selection._target_ is {path!r}, it must be a class path")
    if path in WORDS:
        return WORDS[path]
    word = word_of(path.rsplit(".", 1)[-1])
    return path if word in WORDS.values() else word


def trained_by_word(selection: Mapping[str, Any]) -> Json:
    """`by_word` of what is about to be trained with: the word must mean this rule alone."""
    record = by_word(selection)
    if "." in record["rule"]:
        raise UserError(
            f"selection._target_ is {record['rule']}: a built-in rule has that class name, "
            "choose another"
        )
    return record


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
        raise UserError(f"no rule {word!r} is known here (modules=[...] imports one's own)")
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
        if issubclass(rule, Selection) and rule.__module__ != ours.__name__:
            word = word_of(rule.__name__)
            if RULES.setdefault(word, rule) is not rule:
                raise UserError(
                    f"modules: {module.__name__}.{rule.__name__} has the name of another rule, "
                    f"{word}: rename it"
                )
