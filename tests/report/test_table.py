"""Numbers and cells of the table that the runs of a report become; test_report.py has it whole."""

import numpy as np
import pytest

from slm.report.table import line_of, tokens_to_reach
from slm.train.curves import Curve


@pytest.mark.parametrize(
    ("loss", "tokens"), [(9.5, 0), (9.0, 0), (7.0, 200), (5.0, 200), (4.0, 300), (2.9, None)]
)
def test_tokens_to_reach_is_the_first_crossing_interpolated(loss, tokens):
    seen, losses = np.array([0.0, 200, 400, 500]), np.array([9.0, 5.0, 3.0, 8.0])
    assert tokens_to_reach(Curve("", seen, losses), loss) == tokens


def test_a_bar_in_a_name_ends_no_cell():
    assert line_of(["a|b", "3"]) == "| a\\|b | 3 |"
