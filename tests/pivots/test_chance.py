"""The binomial model against draws and against the definitions."""

import math
from pathlib import Path

import numpy as np
import pytest

from slm.pivots.chance import (
    expected_false,
    interval,
    least_count,
    more_often,
    noise,
    reported,
    threshold,
)


def test_chance_of_a_report_is_that_of_draws():
    generator = np.random.default_rng(0)
    for n, least, before, after in [(10, 2, 0.5, 0.5), (64, 13, 0.4, 0.8), (32, 5, 0.9, 0.7)]:
        drawn = generator.binomial(n, after, 200_000) - generator.binomial(n, before, 200_000)
        share = (abs(drawn) >= least).mean()
        assert reported(n, least, before, after) == pytest.approx(share, abs=0.004)


@pytest.mark.parametrize(("n", "least"), [(1, 1), (10, 2), (10, 10), (64, 13), (64, 30), (300, 60)])
def test_noise_is_largest_at_one_half(n, least):
    shares = [reported(n, least, p, p) for p in np.linspace(0, 1, 41)]
    assert noise(n, least) == pytest.approx(max(shares), rel=1e-9)


def test_the_page_shows_the_chances():
    page = (Path(__file__).parents[2] / "slm" / "pivots" / "README.md").read_text()
    row = page.partition("| confirmed | ")[2].partition(" |\n")[0]
    gaps = [0, 0.1, 0.2, 0.3, 0.4]
    expected = [reported(64, 13, 0.5 - gap / 2, 0.5 + gap / 2) for gap in gaps]
    assert [float(cell) for cell in row.split(" | ")] == pytest.approx(expected, abs=0.005)


def test_a_threshold_in_samples_reaches_the_gap():
    assert [least_count(gap, n) for gap, n in [(0.2, 64), (0.25, 64), (0.1, 30), (0.01, 10)]] == [
        *(13, 16, 3, 1)
    ]


def test_few_samples_raise_the_threshold():
    assert threshold(0.2, 64, 0.05) == 13 and 0.02 < noise(64, 13) < 0.03
    assert noise(10, 2) > 0.5 and noise(10, 4) > 0.05 >= noise(10, 5)
    assert threshold(0.2, 10, 0.05) == 5
    assert threshold(0.2, 2, 0.05) == 3  # two samples show nothing: none is ever confirmed


def test_false_ones_are_counted_from_those_that_failed():
    share = noise(64, 13)
    assert expected_false([], 64, 13) == 0
    assert expected_false([40, 13], 64, 13) == pytest.approx(share / (1 - share))
    assert expected_false([40] + [12] * 99, 64, 13) == pytest.approx(100 * share / (1 - share))


def test_interval_is_that_of_the_paper():
    """Of the bounds of each share, the roots of the score equation, the distances squared."""

    def roots(k: int, n: int) -> list[float]:
        z = 1.959964
        a, b, c = n + z * z, -(2 * k + z * z), k * k / n
        return [(-b + s * math.sqrt(b * b - 4 * a * c)) / (2 * a) for s in (-1, 1)]

    for before, after, n in [(26, 51, 64), (0, 64, 64), (10, 3, 10)]:
        (low0, high0), (low1, high1) = roots(before, n), roots(after, n)
        p0, p1 = before / n, after / n
        low = p1 - p0 - math.sqrt((p1 - low1) ** 2 + (high0 - p0) ** 2)
        high = p1 - p0 + math.sqrt((high1 - p1) ** 2 + (p0 - low0) ** 2)
        assert interval(before, after, n) == pytest.approx((low, high))


def test_fishers_p_value_is_that_of_all_orders():
    """3 of 4 against 1 of 4: Fisher's tea, 17/70."""
    assert more_often(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert more_often(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert more_often(0, 4, 4, 4) == 1
