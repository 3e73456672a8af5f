"""Differences of arms and their intervals, against numbers by hand and by simulation."""

from pathlib import Path

import numpy as np
import pytest

from run_helpers import make_run
from slm.evaluate.losses import WindowLosses
from slm.report.arms import Run, arms_of, check_runs, read_runs
from slm.report.differences import difference, half_width, student
from slm.report.table import against_all_tokens, control_runs, minus_text
from slm.store.files import read_json, write_json
from slm.train.curves import write_window_losses

# 97.5th percentiles of Student's t, as tables print them.
STUDENT = {3: 3.1824, 4: 2.7764, 8: 2.3060, 11: 2.2010, 30: 2.0423, 300: 1.9679}


def losses(nats: np.ndarray, targets: np.ndarray) -> WindowLosses:
    return WindowLosses(np.arange(len(nats)), nats, targets, targets)


def test_the_interval_is_that_of_a_mean_where_windows_are_of_one_size():
    rng = np.random.default_rng(0)
    one, other = rng.normal(30, 3, (2, 12))
    targets = np.full(12, 10)
    per_token = (one - other) / 10
    by_hand = STUDENT[11] * per_token.std(ddof=1) / np.sqrt(12)
    found = half_width(losses(one, targets), losses(other, targets))
    assert found == pytest.approx(by_hand, rel=0.002)


def test_the_interval_covers_the_difference_of_all_text():
    """Windows of many sizes, all of one difficulty that both models share; 95 of 100 cover."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        targets = rng.integers(5, 60, 24)
        hard = rng.normal(3, 1, 24)
        delta = rng.normal(-0.1, 0.05, 24)
        one, other = targets * (hard + delta), targets * hard
        found = half_width(losses(one, targets), losses(other, targets))
        assert found is not None and found < 0.05  # unpaired: about 0.6
        covered += abs((one - other).sum() / targets.sum() + 0.1) <= found
    assert 0.91 <= covered / 400 <= 0.98


@pytest.mark.parametrize("freedom", STUDENT)
def test_students_quantile(freedom):
    assert student(freedom) == pytest.approx(STUDENT[freedom], rel=0.015 if freedom > 3 else 0.02)


def test_other_windows_and_few_have_no_interval():
    targets = np.full(6, 4)
    one, other = losses(np.arange(6.0), targets), losses(np.ones(6), targets)
    assert half_width(one, other) is not None
    assert half_width(one, other._replace(window=np.arange(6) + 1)) is None
    assert half_width(one, other._replace(targets=targets + 1)) is None
    few = WindowLosses(*(column[:3] for column in one))
    assert half_width(few, few) is None


def arms(folder: Path) -> list[Run]:
    """Two seeds of k = 0.5, two of all tokens: windows of 10 targets, their mean is the loss."""
    easy = np.array([-8.0, -3, 0, 4, 7])
    for seed, (half, whole) in enumerate([(3.0, 3.5), (3.25, 4.25)]):
        for name, ratio, loss, tilt in (("half", 0.5, half, 0.1), ("whole", 1.0, whole, 0.0)):
            run = make_run(folder / f"{name}{seed}", "Excess", ratio, seed, loss)
            nats = 10 * loss + easy + tilt * np.array([1, -1, 0, 2, -2.0])
            write_window_losses(run, 400, {"a": losses(nats, np.full(5, 10))})
    return read_runs([str(folder)])[0]


def test_an_arm_beside_all_tokens_by_hand(tmp_path):
    half, whole = arms_of(arms(tmp_path))
    found = difference(half, whole.runs, "a")
    assert found.mean == pytest.approx(3.125 - 3.875)
    assert found.seeds == [-0.5, -1.0]
    tilt = 0.01 * np.array([1, -1, 0, 2, -2.0])  # nats per token around the difference
    by_hand = STUDENT[4] * np.sqrt((tilt**2).sum() / 4 / 5)
    assert found.half == pytest.approx(by_hand, rel=0.02)
    row = against_all_tokens(half, whole.runs, "a")
    assert row["minus_all_tokens_lowest_seed"] == -1.0
    assert row["minus_all_tokens_highest_seed"] == -0.5
    assert minus_text(row, 3) == "-0.750 ± 0.020"
    assert set(against_all_tokens(whole, whole.runs, "a").values()) == {None}
    assert set(against_all_tokens(half, [], "a").values()) == {None}


def test_one_seed_is_a_pair_in_one_order_alone(tmp_path, caplog):
    arms(tmp_path)
    for name, order in (("half0", "keyed"), ("half1", "keyed"), ("whole1", "keyed")):
        path = tmp_path / name / "run.json"
        write_json(path, read_json(path) | {"data.order": order})
    half, whole = arms_of(read_runs([str(tmp_path)])[0])  # an order makes no arm
    assert difference(half, whole.runs, "a").seeds == [-1.0]
    check_runs([*half.runs, *whole.runs])
    assert "keyed" in caplog.text and "whole0 permutation" in caplog.text


def test_runs_that_kept_no_windows_have_a_difference_without_interval(tmp_path):
    runs = arms(tmp_path)
    (tmp_path / "whole1" / "heldout_windows.csv").unlink()
    half, whole = arms_of(read_runs([str(tmp_path)])[0])
    assert control_runs([half, whole]) == whole.runs
    assert difference(half, whole.runs, "a").half is None
    assert difference(half, whole.runs, "b").half is None and len(runs) == 4
    assert difference(half, whole.runs, "b").mean == pytest.approx(2 * (3.125 - 3.875))
