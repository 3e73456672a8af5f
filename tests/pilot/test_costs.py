"""The break-even against what both ways cost there, counted one by one."""

import numpy as np
import pytest

from slm.pilot.costs import Costs, cost_record, pays, reached
from slm.pilot.statistics import Interval

COSTS = Costs(all=6.0, excess=5.0, scoring=2.0, reference=9000.0)


def bill(costs: Costs, ratio: float, tokens: float, runs: float = 1) -> float:
    """Of targets that stop at all tokens' loss; each token is scored once."""
    seen = ratio * tokens
    return (costs.reference or 0) + seen * costs.scoring + runs * seen * costs.excess


def test_from_the_break_even_on_selection_costs_less():
    tokens = COSTS.break_even_tokens(0.5)
    assert bill(COSTS, 0.5, tokens) == pytest.approx(tokens * COSTS.all)
    assert COSTS.share(0.5, tokens) == pytest.approx(1)
    assert COSTS.share(0.5, 2 * tokens) == pytest.approx(
        bill(COSTS, 0.5, 2 * tokens) / (2 * tokens * COSTS.all)
    )
    runs = COSTS.break_even_runs(0.5, 1000)
    assert bill(COSTS, 0.5, 1000, runs) == pytest.approx(runs * 1000 * COSTS.all)


def test_what_saves_nothing_never_pays_and_what_was_not_counted_is_not_known():
    assert COSTS.break_even_tokens(0.9) == np.inf  # 0.9 * 7 is more than 6
    assert COSTS.break_even_runs(1.2, 1000) == np.inf
    reach = Interval(0.5, 0.4, np.inf, 3, 10)
    record = cost_record(COSTS, reach, 10_000)
    assert record["break_even_tokens"]["high"] is None
    assert record["ratio_with_scoring"]["mean"] == pytest.approx(0.5 * 7 / 6)
    assert record["ratio_of_targets_alone"]["mean"] == pytest.approx(0.5 * 5 / 6)
    assert pays(None, reach, 10_000) == "unknown"
    nothing = Interval(np.nan, np.nan, np.nan, 3, 10)
    assert pays(COSTS, nothing, 10_000) == "unknown"
    assert reached(nothing) == "all tokens learn nothing" and reached(reach) == "yes"
    assert reached(reach._replace(mean=np.inf)) == "no"
    assert cost_record(COSTS, nothing, 9)["break_even_tokens"]["mean"] is None


@pytest.mark.parametrize(
    ("low", "high", "tokens", "wanted"),
    [
        (0.4, 0.6, 10_000, "yes"),
        (0.4, 0.6, 2_000, "no"),  # the reference alone costs 9000 of 12000
        (0.4, np.inf, 10_000, "open"),
        (0.9, 0.95, 10**9, "no"),
    ],
)
def test_it_pays_where_the_whole_interval_does(low, high, tokens, wanted):
    assert pays(COSTS, Interval(0.5, low, high, 3, 10), tokens) == wanted
