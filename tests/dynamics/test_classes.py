"""Classes of tokens against a loop and against trajectories made by hand at the thresholds."""

import math

import numpy as np
import pytest

import slm.dynamics.classes as classes
from slm.dynamics.classes import CLASSES, class_losses, class_shares, classify
from slm.errors import UserError


def by_loop(losses: np.ndarray, threshold: float) -> list[str]:
    """The paper's appendix, token by token, with NumPy's own line fit."""
    level, found = losses[-1].mean(), []
    for token in losses.T:
        slope, intercept = np.polyfit(np.arange(len(token)), token, 1)
        start, end = intercept, slope * (len(token) - 1) + intercept
        if end - start < -threshold:
            found.append("HL")
        elif end - start > threshold:
            found.append("LH")
        else:
            found.append("LL" if token[-1] <= level else "HH")
    return found


def names(label: np.ndarray) -> list[str]:
    return [CLASSES[index] for index in label]


@pytest.mark.parametrize("num_checkpoints", [3, 4, 17])
@pytest.mark.parametrize("block", [7, 1000])
def test_classes_are_those_of_a_loop(num_checkpoints, block, monkeypatch):
    monkeypatch.setattr(classes, "BLOCK", block)
    generator = np.random.default_rng(num_checkpoints)
    start = 6 * generator.random(200)
    change = generator.normal(0, 0.4, 200)
    steps = np.linspace(0, 1, num_checkpoints)[:, None]
    losses = start + change * steps + generator.normal(0, 0.05, (num_checkpoints, 200))
    found = classify(list(losses.astype(np.float32)))
    expected = by_loop(losses.astype(np.float32).astype(np.float64), 0.2)
    assert names(found.label) == expected
    assert set(expected) == set(CLASSES)


def test_line_variance_crossings_and_first_checkpoint_below_by_hand():
    # Five checkpoints; mean_loss is 2.
    losses = np.array([[3.0, 1, 4], [1, 1, 4], [3, 1, 4], [1, 1, 4], [2, 1, 5]])
    found = classify(list(losses), mean_loss=2.0)
    # First token: slope -0.2 about the mean 2.0, so the line runs from 2.4 to 1.6.
    assert found.start == pytest.approx([2.4, 1.0, 3.8])
    assert found.end == pytest.approx([1.6, 1.0, 4.6])
    assert found.delta == pytest.approx([-0.8, 0.0, 0.8])
    residual = np.array([0.6, -1.2, 1.0, -0.8, 0.4])
    assert found.variance[0] == pytest.approx(np.mean(residual**2))
    assert found.crossings.tolist() == [3, 0, 0]
    assert found.first_below.tolist() == [1, 0, -1]
    assert names(found.label) == ["HL", "LL", "LH"]


@pytest.mark.parametrize(
    ("delta", "last", "expected"),
    [
        (-0.25, 9.0, "HL"),  # by the change alone, however high it ends
        (-0.25, 0.1, "HL"),
        (0.25, 0.1, "LH"),  # and however low
        (-0.125, 3.0, "LL"),  # at the mean loss it is low
        (0.125, 3.0, "LL"),
        (0.0, 3.001, "HH"),
        (-0.2, 9.0, "HH"),  # at the threshold nothing has changed
        (0.2, 1.0, "LL"),
    ],
)
def test_thresholds(delta, last, expected):
    label = classes.labels(np.array([delta]), np.array([last]), 0.2, 3.0)
    assert names(label) == [expected]


def test_mean_loss_is_that_of_the_last_checkpoint():
    losses = [np.array([1.0, 9.0]), np.array([1.0, 9.0]), np.array([1.0, 9.0])]
    assert names(classify(losses).label) == ["LL", "HH"]
    assert names(classify(losses, mean_loss=0.5).label) == ["HH", "HH"]


def test_shares_with_their_bootstrap_interval():
    label = np.repeat([0, 1, 2, 3], [110, 120, 260, 510]).astype(np.uint8)
    shares = class_shares(label, samples=4000)
    for name, share in zip(CLASSES, (0.11, 0.12, 0.26, 0.51), strict=True):
        found = shares[name]
        assert found.share == share and found.num_tokens == round(1000 * share)
        spread = 1.96 * math.sqrt(share * (1 - share) / 1000)  # of a binomial
        assert found.low == pytest.approx(share - spread, abs=0.004)
        assert found.high == pytest.approx(share + spread, abs=0.004)


def test_mean_loss_of_each_class():
    label = np.array([3, 0, 3, 2], np.uint8)
    found = class_losses(label, [np.array([1.0, 5, 3, 7]), np.array([2.0, 6, 2, 0])])
    np.testing.assert_allclose(found, [[5, np.nan, 7, 2], [6, np.nan, 0, 2]])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([np.ones(3)] * 2, "2 checkpoints have token losses, a trajectory needs 3"),
        ([np.ones(3), np.ones(4), np.ones(3)], r"losses of \[3, 4\] tokens"),
        ([np.ones(0)] * 3, r"losses of \[0\] tokens"),
        (
            [np.ones(3), np.array([1, np.nan, 1]), np.ones(3)],
            "checkpoint 1: loss nan at token 1",
        ),
    ],
)
def test_mistakes_are_named(losses, message):
    with pytest.raises(UserError, match=message):
        classify(losses)
