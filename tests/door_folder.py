"""Trainers that are installed beside each other without their dependencies: tests/doors.txt."""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

DOORS = Path(sys.prefix) / "doors"


@contextmanager
def door(adapter: str) -> Iterator[ModuleType]:
    """The module slm.integrations.<adapter>; later tests do not see what was imported for it."""
    assert DOORS.is_dir(), f"{DOORS} is missing: `make .venv/.installed` makes it"
    name = f"slm.integrations.{adapter}"
    sys.path.append(str(DOORS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a third party's, of what it imports
        module = importlib.import_module(name)
    try:
        yield module
    finally:
        sys.path.remove(str(DOORS))
        for other, loaded in list(sys.modules.items()):
            if (getattr(loaded, "__file__", None) or "").startswith(str(DOORS)):
                del sys.modules[other]
        del sys.modules[name]
