"""A sweep's figures: means and ranges over seeds, axes and colours that panels share."""

import numpy as np

from slm.report.page.sweep import ratio_figure, tokens_figures
from slm.report.paper.plots import RatioPanel, TokensPanel
from slm.train.curves import Curve


def lines_of(figure) -> dict:
    return {trace["name"]: trace["y"] for trace in figure["data"]}


def test_final_losses_are_means_with_the_range_of_the_seeds():
    panel = RatioPanel(
        "a", {"excess": [(0.6, [3.0, 3.4]), (0.2, [5.0])]}, {"softmax": 3.1}, {"all tokens": 3.3}
    )
    figure = ratio_figure(panel)
    excess = figure["data"][0]
    assert (excess["x"], excess["y"]) == ([0.2, 0.6], [5.0, 3.2])
    assert excess["error_y"]["array"] == excess["error_y"]["arrayminus"] == [0.0, 0.2]
    assert lines_of(figure)["all tokens"] == [3.3, 3.3] and figure["title"] == "a"
    assert lines_of(figure)["softmax"] == [3.1, 3.1]


def test_panels_of_a_set_share_an_axis_and_a_label_its_colour():
    seen = np.array([0.0, 100, 200])
    curves = [
        Curve("k = 0.2", seen, np.array([9.0, 5, 4])),
        Curve("k = 0.2", seen, np.array([9.0, 5, 3])),
    ]
    alone = [Curve("k = 0.6", seen, np.array([9.0, 8, 2]))]
    control = [Curve("all tokens", seen, np.array([9.0, 4, 3.5]))]
    grid = [[TokensPanel("x, a", curves, control), TokensPanel("y, a", alone + curves, control)]]
    first, second = tokens_figures(grid)
    assert first["layout"]["yaxis"]["range"] == second["layout"]["yaxis"]["range"] == [1.76, 8.24]
    mean = [t for t in first["data"] if t["name"] == "k = 0.2" and "showlegend" not in t]
    assert mean[0]["x"] == [100, 200] and mean[0]["y"] == [5.0, 3.5]  # 9 at 0 is left out
    shades = {t["name"]: t["line"]["color"] for t in [*first["data"], *second["data"]]}
    assert shades["k = 0.2"] != shades["k = 0.6"]
    assert shades["k = 0.2"] == mean[0]["line"]["color"]


def test_the_axis_leaves_the_first_tenth_of_training_out():
    seen = np.array([0.0, 10, 50, 100, 500, 1000])
    curve = Curve("k", seen, np.array([11.0, 9, 8, 4, 3, 2]))
    (found,) = tokens_figures([[TokensPanel("a", [curve], [])]])
    assert found["data"][0]["y"] == [9.0, 8.0, 4.0, 3.0, 2.0]  # zooming out shows them
    assert found["layout"]["yaxis"]["range"] == [1.92, 4.08]
