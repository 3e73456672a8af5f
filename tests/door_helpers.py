"""Trainers that are installed beside each other without their dependencies: tests/doors.txt."""

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

DOORS = Path(sys.prefix) / "doors"


def run_example(name: str, *words: str) -> list[str]:
    """The lines that a file of experiments/doors prints, started as its docstring says."""
    root = Path(__file__).resolve().parents[1]
    paths = (root, root / "kernels", DOORS)
    done = subprocess.run(
        [sys.executable, f"experiments/doors/{name}.py", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        cwd=root,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


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
