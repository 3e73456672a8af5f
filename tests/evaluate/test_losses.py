"""Sums over windows."""

import math

import numpy as np
import pytest

from slm.evaluate.losses import WindowLosses


def losses(nats: list[float], targets: list[int], num_bytes: list[int]) -> WindowLosses:
    columns = (np.arange(len(nats)), np.array(nats), np.array(targets), np.array(num_bytes))
    return WindowLosses(*columns)


def test_windows_count_by_their_targets():
    loss, bits, num_targets, num_bytes = losses([6.0, 1.0], [3, 1], [8, 6]).total()
    assert (loss, num_targets, num_bytes) == (7 / 4, 4, 14)
    assert bits == pytest.approx(7 / math.log(2) / 14)


def test_nothing_to_divide_by_is_nan_and_not_zero():
    assert math.isnan(losses([0.0], [0], [0]).total().loss)
    assert math.isnan(losses([2.0], [1], [0]).total().bits_per_byte)  # EOS alone
