"""A function of keyword arguments against the table of its keys, called as from Python."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from slm.checks import Table, anything, optional, real, text, whole
from slm.errors import NonFiniteError, UserError
from slm.stage import stage

TABLE: Table = {
    "out": text,
    "count": whole(1),
    "ratio": real(0, 1),
    "group.size": optional(whole(1)),
    "group.path": optional(text),
    "rest": anything,
}
GROUP = {"size": 3, "path": None}


@stage(TABLE)
def made(
    out: Any,
    *,
    count: int = 2,
    ratio: float = 0.5,
    group: Mapping[str, Any] = GROUP,
    rest: Any = (),
) -> dict[str, Any]:
    """What the body sees."""
    return dict(locals())


class Shelf:
    """Stands for a folder."""

    def __fspath__(self) -> str:
        return "shelf"


def test_the_body_sees_plain_values_and_groups_over_their_defaults():
    rule = object()
    found = made(
        Shelf(),
        count=np.int64(4),  # type: ignore[arg-type]
        ratio=np.float32(0.25),  # type: ignore[arg-type]
        group={"path": PurePosixPath("a/b")},
        rest=({"x": Path("c")}, True, rule),
    )
    assert found == {
        "out": "shelf",
        "count": 4,
        "ratio": 0.25,
        "group": {"size": 3, "path": "a/b"},
        "rest": [{"x": "c"}, True, rule],
    }
    assert [type(found[name]) for name in ("count", "ratio")] == [int, float]
    assert made("x") == {"out": "x", "count": 2, "ratio": 0.5, "group": GROUP, "rest": []}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cuont": 1}, "cuont is given, and nothing reads it, did you mean count?"),
        (
            {"node": {"size": 1}},
            "node.size is given, and nothing reads it, did you mean group.size?",
        ),
        ({"group": {"sise": 1}}, "group.sise is given, and nothing reads it, did you mean group."),
        ({"count": 0}, "count is 0, it must be a whole number of at least 1"),
        ({"group": {"size": "big"}}, "group.size is 'big', it must be a whole number of at least"),
        ({"out": ""}, "out is '', it must be a text that is not empty"),
    ],
)
def test_what_is_wrong_is_said_as_on_the_command_line(settings, sentence):
    with pytest.raises(UserError) as raised:
        made(**({"out": "x"} | settings))
    assert str(raised.value).startswith(sentence)


def test_what_is_missing_is_pythons_to_say():
    with pytest.raises(TypeError, match="missing a required argument: 'out'"):
        made()  # type: ignore[call-arg]


def test_a_user_error_comes_out_of_what_wraps_it():
    @stage({})
    def failing() -> None:
        raise errors.pop()

    wrapped = RuntimeError("instantiate")
    wrapped.__cause__ = UserError("the value is 3")
    errors: list[Exception] = [wrapped, FileNotFoundError(2, "No such file", "a.txt")]
    errors += [NonFiniteError("nan"), ZeroDivisionError()]
    for kind, sentence in (
        (ZeroDivisionError, None),
        (NonFiniteError, "^nan$"),
        (UserError, "^a.txt: No such file$"),
        (UserError, "^the value is 3$"),
    ):
        with pytest.raises(kind, match=sentence):
            failing()


def test_it_looks_like_the_function():
    assert made.__name__ == "made" and made.__doc__ == "What the body sees."
