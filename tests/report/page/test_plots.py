"""What one definition draws is the same on the page, on paper and in the table."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from figure_helpers import rows_of, values_of
from slm.dynamics.colours import BLUE, ORANGE
from slm.dynamics.figure import LOSS, Axis, Figure, Panel, Series, one_panel, share
from slm.report.page.plots import boxes
from slm.report.paper.plots import draw

SEEN_AT = np.array([0, 100, 200])
BARS: Any = {"kind": "bars", "low": np.array([0.1, 0.2]), "high": np.array([0.4, 0.6])}
FIGURES = {
    "lines": one_panel(
        "h",
        LOSS._replace(bounds=(1.0, 4.0)),
        [
            Series("a", BLUE, SEEN_AT, np.array([3.0, np.nan, 1.0]), mark="circle"),
            Series("b", ORANGE, SEEN_AT, np.array([4.0, 3.0, 2.0]), "B", dash="dash", at=1),
        ],
    ),
    "points": one_panel(
        "h",
        share("part"),
        [
            Series("a", BLUE, [200], np.array([0.5]), kind="points", note="final")._replace(
                low=np.array([0.4]), high=np.array([0.7])
            )
        ],
    ),
    "groups": one_panel(
        "h",
        share("part"),
        [
            Series("a", BLUE, ["x", "y"], np.array([0.2, 0.4]), **BARS),
            Series("b", ORANGE, ["x", "y"], np.array([0.3, 0.5]), **BARS),
        ],
        x=Axis("", "word"),
    ),
    "stack": Figure(
        "",
        [
            Panel(
                "p",
                Axis("x", "x"),
                share("part"),
                [
                    Series("a", BLUE, SEEN_AT, np.array([0.1, 0.2, 0.3]), kind="bars"),
                    Series("b", ORANGE, SEEN_AT, np.array([0.3, 0.2, 0.1]), kind="bars"),
                ],
                stacked=True,
            )
        ],
    ),
}


@pytest.mark.parametrize("name", ["lines", "groups", "stack"])
def test_the_page_and_the_paper_draw_the_same_numbers(tmp_path, kept, name):
    draw(FIGURES[name], tmp_path / "f.png")
    (box,) = boxes(name, FIGURES[name])
    column, written = FIGURES[name].panels[0].y.column, defaultdict(list)
    for row in rows_of(tmp_path / "f.png"):
        written[row["series"]].append(float(row[column]))
    axis = "x" if box["layout"]["yaxis"].get("type") == "category" else "y"  # words: rows
    on_page = [[y for y in trace[axis] if y is not None] for trace in box["data"]]
    assert on_page == [pytest.approx(ys) for ys in written.values()]
    assert values_of(kept[0].axes[0]) == [pytest.approx(ys) for ys in on_page]


def test_a_box_says_what_the_definition_says():
    (box,) = boxes("n", FIGURES["lines"]._replace(caption="c"))
    assert (box["figure"], box["title"], box["caption"]) == ("n", "h", "c")
    first, second = box["data"]
    assert first["y"] == [3.0, None, 1.0] and (first["name"], second["name"]) == ("a", "B")
    assert first["line"]["color"] == "light-dark(#0072b2, #56b4e9)"
    assert second["line"]["dash"] == "dash" and box["layout"]["yaxis"]["range"] == [1.0, 4.0]
    (box,) = boxes("n", FIGURES["points"])
    assert box["data"][0]["name"] == "a, final" and not box["data"][0]["showlegend"]
    assert box["data"][0]["error_y"]["array"] == [0.2]
    assert box["data"][0]["error_y"]["arrayminus"] == [0.1]
    assert box["layout"]["yaxis"]["rangemode"] == "tozero"


def test_long_lines_are_thinned_and_names_are_no_markup():
    values = np.arange(1000.0)
    (box,) = boxes("n", one_panel("", LOSS, [Series("a<b>", BLUE, values, values)]))
    trace: Any = box["data"][0]
    assert trace["x"] == trace["y"] and len(trace["x"]) == 200 and trace["x"][-1] == 999
    assert trace["name"] == "a&lt;b&gt;"  # Plotly reads <b>


def test_words_are_rows_with_the_first_on_top():
    low, high = np.array([0.1, 0.4]), np.array([0.4, 0.4])
    one = Series("a", BLUE, ["<x>", "y"], np.array([0.2, 0.4]), kind="points", mark="square")
    figure = one_panel("h", share("part"), [one._replace(low=low, high=high)], x=Axis("", "word"))
    (box,) = boxes("n", figure)
    (trace,) = box["data"]
    assert (trace["x"], trace["y"]) == ([0.2, 0.4], ["&lt;x&gt;", "y"]) and trace["showlegend"]
    assert trace["error_x"]["array"] == pytest.approx([0.2, 0])
    assert box["layout"]["yaxis"]["range"] == [1.5, -0.5]
