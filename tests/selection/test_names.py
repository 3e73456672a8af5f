"""One name for a selection, as people say it."""

import pytest

from slm.selection.names import selection_name


def schedule(*ratios: float) -> dict:
    return {"shape": "linear", "points": [[10 * i, ratio] for i, ratio in enumerate(ratios)]}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"rule": "all"}, "all tokens"),
        ({"_target_": "slm.selection.Excess", "select_ratio": 1.0}, "excess k = 1"),
        ({"rule": "random", "select_ratio": 0.3, "seed": 1}, "random k = 0.3"),
        ({"rule": "softmax", "temperature": 2.0}, "softmax"),
        ({"rule": "excess", "select_ratio": schedule(1, 0.6)}, "excess k = 1 → 0.6 (linear)"),
        (
            {"rule": "excess", "select_ratio": schedule(1, 0.9, 0.8, 0.7, 0.6, 0.5)},
            "excess k = 1 → 0.5 in 6 points (linear)",
        ),
    ],
)
def test_a_selection_has_one_name(selection, expected):
    assert selection_name(selection) == expected
