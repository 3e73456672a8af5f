"""Text of tokens as it can be drawn: whole characters, wrapped lines, a ground for each token.

A byte-level token can be a part of a character, a text can have characters that no font at hand
has, and `$` is no formula. The font is the one that comes with matplotlib, so that every machine
draws the same. Each character takes one cell, in the order of the text: Arabic is read from the
left, its letters unjoined.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

FONT = "DejaVu Sans Mono"
FONT_SIZE, CELL_WIDTH, LINE_HEIGHT = 8, 0.602, 1.55  # points; the last two in font sizes
PLACEHOLDER = "\u25a1"  # of characters that the font lacks
SHOWN = {"\n": "\u21b5", "\t": "\u21e5"}
GREY = "#606060"  # of signs for what has no glyph, and of what is no target


def drawable(text: str) -> str:
    """One glyph that the font has for each character."""
    return "".join(map(glyph, text))


def legend_text(text: str, most: int = 14) -> str:
    """In quotes, with its spaces shown and its end cut."""
    shown = drawable(text if len(text) <= most else f"{text[: most - 1]}\u2026")
    return "\u201c" + shown.replace(" ", "\u2423") + "\u201d"


@cache
def glyph(character: str) -> str:
    if character in SHOWN:
        return SHOWN[character]
    kind = unicodedata.category(character)
    if kind[0] == "C" or font().get_char_index(ord(character)) == 0:
        return PLACEHOLDER
    return f"\u25cc{character}" if kind[0] == "M" else character  # an accent needs a letter


@cache
def font() -> Any:
    from matplotlib.font_manager import findfont, get_font

    return get_font(findfont(FONT, fallback_to_default=False))


# ---- lines --------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One character."""

    token: int
    text: str


class Segment(NamedTuple):
    """The part of one token that stands in one line."""

    token: int
    line: int
    column: int
    text: str

    @property
    def width(self) -> int:
        return len(self.text)


def wrap(texts: Sequence[str], columns: int) -> list[Segment]:
    """Lines end at newlines and, before they are longer than `columns`, at a space if they can."""
    cells = [Cell(token, c) for token, text in enumerate(texts) for c in text]
    found, start, line = [], 0, 0
    while start < len(cells):
        end = line_end(cells, start, columns)
        found += segments(cells[start:end], line)
        start, line = end, line + 1
    return found


def line_end(cells: Sequence[Cell], start: int, columns: int) -> int:
    room = [cell.text for cell in cells[start : start + columns]]
    if "\n" in room:
        return start + room.index("\n") + 1
    spaces = [index for index, text in enumerate(room) if text == " " and index >= columns // 2]
    is_last = start + columns >= len(cells)
    return start + (len(room) if is_last or not spaces else spaces[-1] + 1)


def segments(cells: Sequence[Cell], line: int) -> list[Segment]:
    found, column = [], 0
    for token, group in groupby(cells, key=lambda cell: cell.token):
        text = "".join(cell.text for cell in group)
        found.append(Segment(token, line, column, text))
        column += len(text)
    return found


# ---- drawing ------------------------------------------------------------------------------------


def columns_in(width: float) -> int:
    """How many characters fit into so many inches."""
    return int(width * 72 / (FONT_SIZE * CELL_WIDTH))


def size_of(found: Sequence[Segment], columns: int) -> tuple[float, float]:
    """Width and height in inches."""
    lines = found[-1].line + 1 if found else 1
    return columns * CELL_WIDTH * FONT_SIZE / 72, lines * LINE_HEIGHT * FONT_SIZE / 72


def draw_segments(
    axes: Any,  # of the size that `size_of` says
    found: Sequence[Segment],
    grounds: Sequence[Any],  # a colour for each token, None: white
    inks: Sequence[str],  # a colour for each token
    columns: int,
) -> None:
    from matplotlib.patches import Rectangle

    lines = found[-1].line + 1 if found else 1
    axes.set(xlim=(0, columns), ylim=(lines, 0))
    axes.axis("off")
    for part in found:
        if grounds[part.token] is not None:
            box = Rectangle((part.column, part.line + 0.07), part.width, 0.86)
            # The edge is a gap between neighbours: two selected tokens are two.
            box.set(facecolor=grounds[part.token], edgecolor="white", linewidth=0.6)
            axes.add_patch(box)
        draw_text(axes, part, inks[part.token])


def draw_text(axes: Any, part: Segment, ink: str) -> None:
    """Every character in its cell: no font's advance is a whole number of pixels."""
    for offset, character in enumerate(part.text):
        if character != " ":
            place = (part.column + offset, part.line + 0.72)
            colour = GREY if character in SHOWN else ink
            style = {"family": FONT, "size": FONT_SIZE, "ha": "left", "va": "baseline"}
            axes.text(*place, glyph(character), color=colour, parse_math=False, **style)
