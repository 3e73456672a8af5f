"""The ratio over tokens: by hand at, between and outside the points, and every mistake by name."""

import math

import pytest
from omegaconf import OmegaConf

from slm.errors import UserError
from slm.selection.schedules import ratio_schedule

POINTS = [[100, 1.0], [300, 0.5], [500, 0.6]]


def ratios(shape: str, at: list[int]) -> list[float]:
    schedule = ratio_schedule({"shape": shape, "points": POINTS})
    return [schedule.at(tokens) for tokens in at]


def test_a_number_is_constant():
    schedule = ratio_schedule(0.6)
    assert [schedule.at(tokens) for tokens in (0, 1, 10**12)] == [0.6] * 3
    assert ratio_schedule(1).at(5) == 1.0


def test_step_holds_until_the_next_point():
    assert ratios("step", [0, 99, 100, 299, 300, 499, 500, 9999]) == [
        *(1.0, 1.0, 1.0, 1.0),
        *(0.5, 0.5, 0.6, 0.6),
    ]


def test_linear_moves_between_points():
    found = ratios("linear", [0, 100, 150, 200, 300, 400, 500, 600])
    assert found == pytest.approx([1.0, 1.0, 0.875, 0.75, 0.5, 0.55, 0.6, 0.6])


def test_cosine_is_half_a_wave():
    found = ratios("cosine", [0, 100, 150, 200, 300, 500, 600])
    quarter = 0.75 + 0.25 * math.cos(math.pi / 4)
    assert found == pytest.approx([1.0, 1.0, quarter, 0.75, 0.5, 0.6, 0.6])


def test_one_point_is_constant_whatever_the_shape():
    for shape in ("step", "linear", "cosine"):
        schedule = ratio_schedule({"shape": shape, "points": [[50, 0.3]]})
        assert [schedule.at(tokens) for tokens in (0, 50, 51)] == [0.3] * 3


def test_configuration_nodes_are_understood():
    node = OmegaConf.create({"shape": "linear", "points": [[0, 1], [1e6, 0.5]]})
    assert ratio_schedule(node).at(500_000) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r"select_ratio is 0, .*a number in \(0, 1\]"),
        (1.01, r"select_ratio is 1.01, it must be a number in"),
        (math.nan, "select_ratio is nan, it must be a number in"),
        (True, "select_ratio is True"),
        ("sixty", "select_ratio is 'sixty'"),
        ({"shape": "linear"}, r"select_ratio has \['shape'\], it must have shape and points"),
        ({"shape": "square", "points": POINTS}, "select_ratio.shape is 'square'"),
        ({"shape": "step", "points": []}, r"select_ratio.points is \[\], it must be a list"),
        ({"shape": "step", "points": [0.5]}, r"points\[0\] is 0.5, it must be \[tokens_seen"),
        (
            {"shape": "step", "points": [[0, 0.5], [5, 2]]},
            r"points\[1\] is 2, it must be a number in",
        ),
        ({"shape": "step", "points": [[-1, 0.5]]}, "tokens_seen is -1"),
        ({"shape": "step", "points": [[5, 0.5], [5, 0.6]]}, "5 tokens come after 5"),
    ],
)
def test_mistakes_are_named(value, message):
    with pytest.raises(UserError, match=f"selection.{message}" if "select" in message else message):
        ratio_schedule(value)
