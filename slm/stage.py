"""A stage is a function of plain values, called from Python and by its command alike.

    @stage(EVALUATE)
    def evaluate(models: Mapping[str, Folder], sets: Mapping[str, Folder], *, batch_size: int = 32):

Its parameters are the keys of conf/<command>.yaml, so a call is checked by the command's table and
refused with the command's sentences, and the function's body sees what a command line could give:
a path is a text, a tuple is a list, a number of NumPy's is Python's.
"""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from numbers import Integral, Real
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from slm.checks import Table, check
from slm.errors import reported

Folder = str | os.PathLike[str]  # a path, or a Corpus, References or Run, which stand for theirs
P = ParamSpec("P")
R = TypeVar("R")


def stage(
    table: Table, instead: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: call the function with checked and plain arguments; mistakes raise UserError."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            unknown = {key: given[key] for key in given.keys() - signature.parameters.keys()}
            check(unknown, table, instead)
            settings = complete(signature, signature.bind(*args, **given).arguments)
            check(settings, table, instead)
            try:
                return function(**settings)  # type: ignore[call-arg]
            except Exception as error:
                mine = reported(error)
                if mine is None or mine is error:
                    raise
                raise mine from error

        return call

    return decorate


def complete(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter as a plain value; of a group, what was given over its defaults."""
    settings = {}
    for name, parameter in signature.parameters.items():
        value = given[name] if name in given else parameter.default
        if isinstance(value, Mapping) and isinstance(parameter.default, Mapping):
            value = {**parameter.default, **value}
        settings[name] = plain(value)
    return settings


def plain(value: Any) -> Any:
    """What is none of these, such as a selection rule, stays as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


class Package(ModuleType):
    """A stage's folder that is its function too: `slm.prepare(...)` beside `slm.prepare.sources`.

    The function is imported when it is asked for: `import slm.prepare` alone costs nothing.
    """

    @property
    def __call__(self) -> Callable[..., Any]:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"{self.__name__}.command"), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__call__)


def callable_package(name: str) -> None:
    sys.modules[name].__class__ = Package
