"""Ranges of positions; their sums by hand are in test_command.py."""

import math

import pytest
import torch

from slm.errors import UserError
from slm.evaluate.positions import PositionLosses, check_ends
from slm.store.windows import IGNORE_INDEX


def test_ranges_end_with_the_window():
    found = PositionLosses(8)
    targets = torch.arange(16).view(2, 8)
    targets[:, 3] = IGNORE_INDEX
    live = targets != IGNORE_INDEX
    loss = torch.arange(16.0).view(2, 8) * live
    found.add({"targets": targets}, live, live * 2, loss)
    spans = [(r.from_position, r.to_position) for r in found.ranges([3, 4, 8, 20])]
    assert spans == [(0, 3), (3, 4), (4, 8)]
    first, hole, last = (one.loss for one in found.ranges([3, 4]))
    assert (first.loss, first.num_targets, first.num_bytes) == (5.0, 6, 12)
    assert hole.num_targets == 0 and math.isnan(hole.loss)
    assert last.loss == pytest.approx((4 + 5 + 6 + 7 + 12 + 13 + 14 + 15) / 8)


def test_ends_ascend_and_some_windows_reach_them():
    check_ends([1, 2], {"a": 1, "b": 2})
    check_ends([], {})
    with pytest.raises(UserError, match=r"by_position is \[2, 1\], each must be more than the one"):
        check_ends([2, 1], {"a": 4})
    words = r"by_position is \[1, 3\], but the longest windows, of set b, have 2 positions"
    with pytest.raises(UserError, match=words):
        check_ends([1, 3], {"a": 1, "b": 2})
