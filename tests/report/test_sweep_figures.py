"""A sweep's figures: means and ranges over seeds, axes and colours that panels share."""

import numpy as np

from slm.report.sweep_figures import Curves, ratio_panel, tokens_figure
from slm.train.curves import Curve


def test_final_losses_are_means_with_the_range_of_the_seeds():
    lines = {"excess": [(0.6, [3.0, 3.4]), (0.2, [5.0])]}
    panel = ratio_panel("a", lines, {"softmax": 3.1}, {"all tokens": 3.3})
    found = {one.text: one for one in panel.series}
    excess = found["excess"]
    assert excess.low is not None and excess.high is not None
    assert (excess.x, excess.y.tolist()) == ([0.2, 0.6], [5.0, 3.2])
    assert (excess.low.tolist(), excess.high.tolist()) == ([5.0, 3.0], [5.0, 3.4])
    assert found["all tokens"].y.tolist() == [3.3, 3.3] and panel.title == "a"
    assert found["softmax"].y.tolist() == [3.1, 3.1] and found["softmax"].x == [0.2, 0.6]


def test_panels_of_a_set_share_an_axis_and_a_label_its_colour():
    seen = np.array([0.0, 100, 200])
    curves = [
        Curve("k = 0.2", seen, np.array([9.0, 5, 4])),
        Curve("k = 0.2", seen, np.array([9.0, 5, 3])),
    ]
    alone = [Curve("k = 0.6", seen, np.array([9.0, 8, 2]))]
    control = [Curve("all tokens", seen, np.array([9.0, 4, 3.5]))]
    grid = [[Curves("x, a", "a", curves, control), Curves("y, a", "a", alone + curves, control)]]
    first, second = tokens_figure(grid).panels
    assert first.y.bounds == second.y.bounds == (1.76, 8.24)
    (mean,) = [one for one in first.series if one.text == "k = 0.2" and not one.is_seed]
    assert mean.x.tolist() == [100, 200] and mean.y.tolist() == [5.0, 3.5]  # 9 at 0 is left out
    colours = {one.text: one.colour for one in [*first.series, *second.series]}
    assert colours["k = 0.2"] == mean.colour != colours["k = 0.6"]


def test_the_axis_leaves_the_first_tenth_of_training_out():
    seen = np.array([0.0, 10, 50, 100, 500, 1000])
    curve = Curve("k", seen, np.array([11.0, 9, 8, 4, 3, 2]))
    (found,) = tokens_figure([[Curves("a", "a", [curve], [])]]).panels
    assert found.series[0].y.tolist() == [9.0, 8.0, 4.0, 3.0, 2.0]  # zooming out shows them
    assert found.y.bounds == (1.92, 4.08)
