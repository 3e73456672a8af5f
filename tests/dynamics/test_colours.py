"""Colours differ, and text can be read on their tints."""

import re

from slm.dynamics.colours import BLUE, CLASS_COLOURS, PALETTE, ramp, tint


def test_colours_are_css_and_differ():
    for colours in (PALETTE, CLASS_COLOURS.values(), ramp(9)):
        for side in zip(*colours, strict=True):
            assert len(set(side)) == len(side)
            assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in side)
    assert BLUE.css == "light-dark(#0072b2, #56b4e9)"


def test_a_tint_is_mixed_with_white():
    assert tint(BLUE, 1.0) == BLUE.light and tint(BLUE, 0.0) == "#ffffff"
    assert tint(BLUE, 0.5) == "#80b8d8"
