"""The definition of a figure -> plain Plotly dictionaries, one a panel.

Colours are CSS, `light-dark(#0072b2, #56b4e9)`; the script puts in what they are in light or dark.
Plotly reads a little markup in texts, so names go through `plain`.
"""

import html
from typing import Any

import numpy as np

from slm.dynamics.figure import DASHES, Axis, Figure, Panel, Series, decimals, picks, plain_number
from slm.report.page.tokens import numbers
from slm.store.files import Json

MAX_POINTS = 200  # of a line
HATCHES = ("", "/", ".", "x", "-", "|")  # of bars, as lines have DASHES
KINDS = {
    "number": {},
    "tokens": {"tickformat": "~s"},
    "share": {"tickformat": ".1~%", "hoverformat": ".2%"},
}


def boxes(name: str, figure: Figure) -> list[Json]:
    """What the script draws of a figure."""
    return [
        {
            "figure": name,
            "title": ": ".join(filter(None, (figure.heading, panel.title))),
            "caption": " ".join(filter(None, (figure.caption, panel.note))),
        }
        | plotly(panel)
        for panel in figure.panels
    ]


def plotly(panel: Panel) -> Json:
    if any(isinstance(word, str) for one in panel.series for word in one.x):
        return rows(panel)
    layout: Json = {"xaxis": axis(panel.x), "yaxis": measured(panel)}
    if any(one.kind == "bars" for one in panel.series):
        layout |= {"barmode": "stack", "bargap": 0} if panel.stacked else {"bargap": 0.25}
    return {"data": [trace(one, panel) for one in panel.series], "layout": layout}


def rows(panel: Panel) -> Json:
    """Over words: one below the other, where there is room for long names, the first on top."""
    words = [plain(word) for word in dict.fromkeys(w for one in panel.series for w in one.x)]
    names = {"type": "category", "categoryarray": words, "range": [len(words) - 0.5, -0.5]}
    y = axis(panel.x) | names | {"tickvals": words, "ticktext": words}
    layout = {"xaxis": measured(panel), "yaxis": y, "height": 90 + 22 * max(4, len(words))}
    return {"data": [turned(trace(one, panel)) for one in panel.series], "layout": layout}


def turned(found: Json) -> Json:
    """Of a trace over words."""
    words = [plain(word) for word in found["x"]]
    turned = found | {"x": found["y"], "y": words, "orientation": "h"}
    if "error_y" in turned:
        turned["error_x"] = turned.pop("error_y")
    return turned


def measured(panel: Panel) -> Json:
    """Pointed at, a number has the digits that most intervals allow."""
    ends = [(one.low, one.high) for one in panel.series]
    spreads = [high - low for low, high in ends if low is not None and high is not None]
    known = np.concatenate([np.zeros(0), *spreads])
    wide = known[known > 0]
    format_ = {"hoverformat": f".{decimals(float(np.median(wide)))}f"} if len(wide) else {}
    return (format_ if panel.y.kind == "number" else {}) | axis(panel.y)


def axis(found: Axis) -> Json:
    more: Json = {"rangemode": "tozero"} if found.from_zero else {}
    if found.bounds is not None:
        more["range"] = [round(end, 4) for end in found.bounds]
    if found.ticks:
        more |= {"tickvals": [*found.ticks], "ticktext": [f"{tick:g}" for tick in found.ticks]}
    return {"title": {"text": found.title}} | KINDS[found.kind] | more


def trace(one: Series, panel: Panel) -> Json:
    """Thinned out alike for all lines of one length."""
    kept = picks(len(one.y), MAX_POINTS) if one.kind == "line" else np.arange(len(one.y))
    note = one.note if one.kind == "points" else ""
    found: Json = {
        "name": plain(", ".join(filter(None, (one.text, note)))),
        "legendgroup": plain(one.text),
        "showlegend": one.text != ""
        and not (one.kind == "points" and one.note)
        and not one.is_seed,
        "y": numbers(one.y[kept], 5 if panel.stacked else 4),
    }
    if one.low is not None and one.high is not None and (one.high > one.low).any():
        found["error_y"] = interval(one.y[kept], one.low[kept], one.high[kept])
    if panel.stacked:  # bins touch each other: their places are not rounded one by one
        found |= {"x0": float(one.x[0]), "dx": float(one.x[1] - one.x[0])}
    else:
        found["x"] = [plain_number(one.x[index]) for index in kept]
    return found | LOOKS[one.kind](one)


def interval(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> Json:
    ends = {"array": numbers(high - values, 5), "arrayminus": numbers(values - low, 5)}
    return {"type": "data", "symmetric": False, "thickness": 1.2} | ends


def line(one: Series) -> Json:
    found: Json = {"type": "scatter", "mode": "lines"}
    found["line"] = {"color": one.colour.css, "width": one.width, "dash": one.dash}
    if one.mark:
        size = 9 if "triangle" in one.mark else 7
        most = {} if one.low is not None else {"maxdisplayed": 10}  # intervals go with their marks
        marker = {"symbol": one.mark, "size": size} | most
        found |= {"mode": "lines+markers", "marker": marker}
    return found | ({"hoverinfo": "skip", "opacity": 0.45} if one.is_seed else {})


def points(one: Series) -> Json:
    marker = {
        "color": one.colour.css,
        "symbol": one.mark or "circle",
        "size": 12 if one.note else 8,
    }
    return {"type": "scatter", "mode": "markers", "marker": marker}


def bars(one: Series) -> Json:
    pattern = {"shape": HATCHES[DASHES.index(one.dash)]}
    marker = {"color": one.colour.css, "pattern": pattern, "line": {"width": 0}}
    return {"type": "bar", "marker": marker}


LOOKS: dict[str, Any] = {"line": line, "points": points, "bars": bars}


def plain(text: str) -> str:
    """Plotly takes <b>, <a> and entities for markup."""
    return html.escape(text, quote=False)
