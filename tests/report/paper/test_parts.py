"""Tables hold what is drawn; panels show what there is to see."""

import numpy as np
import pytest

from slm.report.paper.parts import Line, amounts, draw_panel, line_rows, plain
from slm.report.paper.plots import pyplot


def test_amounts_are_told_apart():
    assert amounts([0, 13_107_200, 1_500_000_000]) == ["0", "13.1M", "1.5G"]
    assert amounts([13_107_200, 13_107_300]) == ["13,107,200", "13,107,300"]


def test_names_are_plain():
    assert plain(r"a $\x$ \$") == r"a \$\x\$ \\$"


def line(values: list[float], **more) -> Line:
    return Line("p", "s", "label", "#000000", 10 * np.arange(len(values)), np.array(values), **more)


def test_a_table_has_a_row_a_measurement():
    rows = line_rows([line([1.5, np.nan]), line([2.0], target=7)], "loss_nats")
    assert rows == [
        {"panel": "p", "series": "s", "target": "", "tokens_seen": 0, "loss_nats": 1.5},
        {"panel": "p", "series": "s", "target": 7, "tokens_seen": 0, "loss_nats": 2.0},
    ]


@pytest.mark.parametrize(
    "values, top",
    [
        ([50.0, 9.0, *np.linspace(4, 2, 38)], 4.2),  # the start dwarfs the rest
        ([5.0, *np.linspace(4, 2, 39)], 5.15),
        ([50.0, 4.0, 3.0, 2.0], 52.4),  # too few to leave one out
        ([50.0, *[np.nan] * 39], None),
        ([50.0, *[3.0] * 39], 52.35),  # nothing else to see
    ],
)
def test_a_start_that_dwarfs_the_rest_runs_out_of_the_panel(values, top):
    figure, axes = pyplot().subplots()
    draw_panel(axes, [line(values)], "title", 3.0)
    assert list(axes.lines[0].get_ydata()) == pytest.approx(values, nan_ok=True)
    assert top is None or axes.get_ylim()[1] == pytest.approx(top)
    pyplot().close(figure)


def test_a_marked_point_lies_on_its_line():
    figure, axes = pyplot().subplots()
    draw_panel(axes, [line([3.0, 2.0, 1.0], mark=1), line([1.0, 2.0, 3.0])], "title", 3.0)
    (point,) = [drawn for drawn in axes.lines if drawn.get_marker() == "o"]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (10, 2.0)
    pyplot().close(figure)
