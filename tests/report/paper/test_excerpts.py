"""Each character stands once, in one cell, at the token that completes it."""

import warnings

import pytest

from slm.report.paper.excerpts import (
    PLACEHOLDER,
    columns_in,
    draw_segments,
    drawable,
    font,
    legend_text,
    size_of,
    wrap,
)
from slm.report.paper.plots import pyplot, save_figure

WILD = "a$b$ \\frac{1}{2} $x^$\n\t\U0001f600 \u4e2d \u0627\u0644 e\u0301 \x00\u200d\ufffd \u00e4"


def test_every_character_has_one_glyph_that_the_font_has():
    for character in WILD:
        shown = drawable(character)
        assert all(font().get_char_index(ord(glyph)) for glyph in shown)
    assert drawable("\U0001f600\x00\u4e2d") == PLACEHOLDER * 3
    assert drawable("a\n\t\u0301$") == "a\u21b5\u21e5\u25cc\u0301$"


def test_a_legend_shows_spaces_and_cuts():
    assert legend_text(" a\n") == "\u201c\u2423a\u21b5\u201d"
    assert legend_text("x" * 15, most=14) == "\u201c" + "x" * 13 + "\u2026\u201d"
    assert legend_text("x" * 14, most=14) == "\u201c" + "x" * 14 + "\u201d"


@pytest.mark.parametrize("columns", [1, 7, 10, 200])
def test_wrapped_text_is_the_text_in_cells_of_their_own(columns):
    texts = ["The ", "quick", "", " bro", "wn\n", "fox jumps over\n\n", "x" * 25, " end"]
    found = wrap(texts, columns)
    for token, text in enumerate(texts):
        assert "".join(part.text for part in found if part.token == token) == text
    cells = [(part.line, part.column + i) for part in found for i in range(part.width)]
    assert cells == sorted(set(cells)) and max(column for _, column in cells) < columns
    for part in found:
        assert "\n" not in part.text[:-1]
        after = [other for other in found if other.line == part.line and other.column > part.column]
        assert not (part.text.endswith("\n") and after)


def test_lines_end_at_the_last_space_that_fits():
    found = wrap(["one two three", " four"], 10)
    lines = ["".join(p.text for p in found if p.line == line) for line in range(2)]
    assert lines == ["one two ", "three four"]
    assert [p.text for p in wrap(["x yyyyyyyyyyyy"], 10)] == ["x yyyyyyyy", "yyyy"]  # no early end


def test_drawn_grounds_and_letters_are_those_of_the_tokens(tmp_path):
    texts, columns = [*WILD, "ab"], 20
    found = wrap(texts, columns)
    grounds = ["#ff0000" if index % 2 else None for index in range(len(texts))]
    figure, axes = pyplot().subplots()
    draw_segments(axes, found, grounds, ["#000000"] * len(texts), columns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a missing glyph
        save_figure(figure, tmp_path / "f.png")
    boxes = {(box.get_x(), round(box.get_y() - 0.07), box.get_width()) for box in axes.patches}
    assert boxes == {(p.column, p.line, p.width) for p in found if p.token % 2}
    drawn = {
        (text.get_position()[0], int(text.get_position()[1])): text.get_text()
        for text in axes.texts
    }
    for part in found:
        for offset, character in enumerate(part.text):
            expected = None if character == " " else drawable(character)
            assert drawn.pop((part.column + offset, part.line), None) == expected
    assert drawn == {}
    pyplot().close(figure)


def test_sizes_are_those_of_the_font():
    columns = columns_in(6.8)
    width, height = size_of(wrap(["a\nb\n", "c"], columns), columns)
    assert 6.7 < width <= 6.8 and height == pytest.approx(3 * 1.55 * 8 / 72)
    advance = font()
    advance.set_size(8, 72)
    advance.set_text("m" * 100)
    assert advance.get_width_height()[0] / 64 == pytest.approx(100 * 0.602 * 8, rel=0.05)
