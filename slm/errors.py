"""The two ways in which a command ends early on purpose, and how it says so."""

import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200


class UserError(ValueError):
    """A mistake in the input. The text is one sentence with the file, the field and both values.

    Commands print it without a traceback and exit with 1.
    """


class NonFiniteError(FloatingPointError):
    """The loss or the gradient norm is NaN or infinite; raised before the optimizer step."""


def shown(value: Any) -> str:
    """A value in a message, as YAML and JSON have it where there is none, and no whole table."""
    return "null" if value is None else SHORT.repr(value)


def reported(error: BaseException | None) -> Exception | None:
    """The error that one sentence is enough for, be it wrapped by Hydra's `instantiate`."""
    while error is not None:
        if isinstance(error, UserError | NonFiniteError):
            return error
        if isinstance(error, OSError) and error.filename is not None:
            return UserError(f"{error.filename}: {error.strerror}")
        error = error.__cause__
    return None


@contextmanager
def said_once(rank: int) -> Iterator[None]:
    """Around what all ranks refuse alike: the first one says it, the others end."""
    try:
        yield
    except UserError:
        if rank == 0:
            raise
        raise SystemExit(1) from None


def fail(name: str, error: Exception | str) -> NoReturn:
    """One sentence instead of a traceback, and exit code 1."""
    sys.stdout.flush()
    print(f"slm {name}: {error}", file=sys.stderr)
    sys.exit(1)
