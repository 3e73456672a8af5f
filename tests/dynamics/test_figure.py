"""A figure as data: its table, and what its series look like."""

import numpy as np
import pytest

from slm.dynamics.colours import BLUE
from slm.dynamics.figure import (
    LOSS,
    SEEN,
    Figure,
    Panel,
    Series,
    amounts,
    decimals,
    nth_series,
    picks,
    table,
)

SEEN_AT = np.array([0, 100, 200])


def test_amounts_are_told_apart():
    assert amounts([0, 13_107_200, 1_500_000_000]) == ["0", "13.1M", "1.5G"]
    assert amounts([13_107_200, 13_107_300]) == ["13,107,200", "13,107,300"]


def test_picks_are_spread_and_keep_both_ends():
    for count in (1, 3, 64, 200, 201, 1000):
        found = picks(count, 200)
        assert (found[0], found[-1]) == (0, count - 1) and len(found) == min(count, 200)
    assert picks(33, 3).tolist() == [0, 16, 32]


def test_lines_are_dashed_when_all_colours_are_used():
    found = [nth_series(index, "", [], np.array([])) for index in (0, 6, 7, 14)]
    assert [one.dash for one in found] == ["solid", "solid", "dash", "dot"]


def test_a_table_has_a_row_a_measurement():
    token = Series("s", BLUE, [0], np.array([2.0]), target=7)
    panels = [
        Panel("p", SEEN, LOSS, [Series("s", BLUE, [0, 10], np.array([1.5, np.nan])), token]),
        Panel("title", SEEN, LOSS, [token._replace(low=np.array([1.0]))], name="named"),
    ]
    assert table(Figure("", panels)) == [
        row | {"tokens_seen": 0}
        for row in (
            {"panel": "p", "series": "s", "target": "", "loss_nats": 1.5, "low": ""},
            {"panel": "p", "series": "s", "target": 7, "loss_nats": 2.0, "low": ""},
            {"panel": "named", "series": "s", "target": 7, "loss_nats": 2.0, "low": 1.0},
        )
    ]


@pytest.mark.parametrize(
    ("spread", "expected"),
    [(0.25, 2), (0.02, 3), (0.0042, 4), (1e-9, 5), (3.0, 1), (250.0, 0), (0.0, 4)],
)
def test_a_number_has_the_digits_that_its_spread_allows(spread, expected):
    assert decimals(spread) == expected
