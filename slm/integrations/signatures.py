"""An adapter says, when it is imported, that a framework is not the one it was made for."""

import inspect
from collections.abc import Callable
from typing import Any


def check_parameters(function: Callable[..., Any], names: tuple[str, ...], made_for: str) -> None:
    """Raise ImportError unless `function` has these parameters; `made_for`: "trl 1.16"."""
    found = tuple(inspect.signature(function).parameters)
    missing = [name for name in names if name not in found]
    if missing:
        raise ImportError(
            f"{function.__module__}.{function.__qualname__} has no parameter {missing[0]} "
            f"(it has {', '.join(found)}); this adapter was made for {made_for}"
        )


def check_attributes(owner: Any, names: tuple[str, ...], made_for: str) -> None:
    """Raise ImportError unless the class or module `owner` has these attributes."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise ImportError(
            f"{owner.__name__} has no {', '.join(missing)}; this adapter was made for {made_for}"
        )
