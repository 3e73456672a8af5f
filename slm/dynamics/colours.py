"""Every colour of a figure, on light and on dark ground: of the page, the paper figures and W&B.

Okabe and Ito's palette, which colour-blind readers can tell apart; on dark ground its lighter half,
on light ground a little darker than theirs, so that a thin line can be seen.
"""

from typing import NamedTuple

from slm.dynamics.classes import CLASSES


class Colour(NamedTuple):
    light: str  # on light ground, #rrggbb
    dark: str

    @property
    def css(self) -> str:
        return f"light-dark({self.light}, {self.dark})"


INK, QUIET = Colour("#1b1c1e", "#e6e4df"), Colour("#5c6066", "#a2a5aa")
BLUE, ORANGE = Colour("#0072b2", "#56b4e9"), Colour("#d55e00", "#f08a3c")
GREEN, PINK = Colour("#00805c", "#2dbf92"), Colour("#b0508a", "#e08bbd")
YELLOW, SKY = Colour("#c27c00", "#e6b33c"), Colour("#3d9bd1", "#a8d8f5")
PALETTE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, Colour("#6b6e73", "#c4c6ca"))
CLASS_COLOURS: dict[str, Colour] = dict(zip(CLASSES, (ORANGE, PINK, BLUE, GREEN), strict=True))
SELECTED, UNSELECTED = BLUE, YELLOW
STYLE_SHEET = {"ink": INK, "quiet": QUIET, **CLASS_COLOURS}  # the page's variables


def tint(colour: Colour, strength: float = 0.45) -> str:
    """Mixed with white, so that black text on it can be read."""
    parts = [int(colour.light[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - strength * (255 - part)):02x}" for part in parts)


def ramp(count: int) -> list[Colour]:
    """From faint to strong, for labels that have an order; the ends are too near to the ground."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    places = [index / max(1, count - 1) for index in range(count)]
    ends = [(0.72 - 0.67 * place, 0.4 + 0.6 * place) for place in places]  # on light, on dark
    return [Colour(*(to_hex(colormaps["viridis"](end)) for end in pair)) for pair in ends]
