"""The page of a pilot: all of pilot.json, drawn and in tables, on one page without a script.

    page.html    its template, beside this file; its style is that of `slm report`'s page

An interval is drawn as a bar with a mark at the mean, on an axis that all rows of a table share.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from slm.dynamics.colours import PALETTE, STYLE_SHEET
from slm.report.page.page import HERE as REPORT
from slm.report.page.page import templates
from slm.store.files import Json, atomic_file

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT = 640, 300, 56  # of the curves, in units of the drawing
NEVER = "not reached"


class Scale(NamedTuple):
    """Numbers -> 0 to 100, of the width of a drawing."""

    low: float
    high: float

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def write_page(path: Path, found: Json) -> None:
    with atomic_file(path) as file:
        file.write(render(found).encode())


def render(found: Json) -> str:
    environment = templates(HERE)
    environment.filters |= {
        "nats": nats,
        "share": share,
        "count": count,
        "whole": whole,
        "ends": ends,
        "amount": amount,
    }
    return environment.get_template("page.html").render(
        **found,
        scales={name: scale_of(found[name]) for name in ("questions", "beside", "elsewhere")},
        chart=chart(found["curves"]),
        by_set=grouped(found["arms"], "set"),
        colours={name: colour.css for name, colour in STYLE_SHEET.items()},
        style=Markup((REPORT / "page.css").read_text(encoding="utf-8")),
    )


# ---- drawings -----------------------------------------------------------------------------------


def scale_of(rows: Sequence[Json]) -> Scale:
    """With 0 on it, and some room on either side."""
    values = [row[key] for row in rows for key in ("mean", "low", "high")]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.04 * (high - low) or 1.0
    return Scale(low - room, high + room)


def chart(curves: Json) -> Json:
    """Paths of the arms' mean curves. The axis leaves out what a first steep fall would take."""
    seen, loss = curves["tokens_seen"], curves["loss"]
    later = [value for values in loss.values() for value in values[1:]]
    high = max(later) + 0.25 * (max(later) - min(later))
    low = min(later) - 0.05 * (max(later) - min(later))
    high = max(high, low + 1e-9)

    def x(tokens: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * tokens / seen[-1], 1)

    def y(value: float) -> float:
        return round(8 + (HEIGHT - 34) * (high - value) / (high - low), 1)

    lines = [
        {
            "arm": arm,
            "colour": PALETTE[i % len(PALETTE)].css,
            "points": " ".join(f"{x(t)},{y(v)}" for t, v in zip(seen, values, strict=True)),
        }
        for i, (arm, values) in enumerate(loss.items())
    ]
    ticks = [(y(value), f"{value:.{digits(high - low)}f}") for value in nice(low, high)]
    ends = [(x(tokens), f"{tokens:,}") for tokens in (0, seen[-1])]
    return {"lines": lines, "ticks": ticks, "ends": ends, "set": curves["set"]}


def nice(low: float, high: float) -> list[float]:
    """Three to seven round numbers between the two."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(part for part in (1, 0.5, 0.2, 0.1) if (high - low) / (step * part) >= 3)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def digits(spread: float) -> int:
    return max(0, 2 - math.floor(math.log10(spread)))


def grouped(rows: Sequence[Json], key: str) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


# ---- texts --------------------------------------------------------------------------------------


def nats(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"


def share(value: float | None) -> str:
    """0.352 -> 35%"""
    return (
        NEVER if value is None else f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"
    )


def count(value: float | None) -> str:
    """1234567.8 -> 1.2M"""
    if value is None:
        return NEVER
    for size, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{word}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def whole(value: float | None) -> str:
    """0.16 -> 1: there is no part of a target."""
    return NEVER if value is None else f"{max(1, math.ceil(value)):,}"


def amount(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def ends(found: Mapping[str, float | None], form: str) -> str:
    """(30% to 41%)"""
    write = {"share": share, "count": count, "whole": whole}[form]
    return f"({write(found['low'])} to {write(found['high'])})"
