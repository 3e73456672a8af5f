"""The figure holds the numbers it was given; the page shows text as it is and runs none of it."""

from typing import Any

import numpy as np
import pytest

from slm.dynamics.colours import BLUE
from slm.dynamics.figure import LOSS, SEEN, Figure, Panel, Series
from slm.report.paper import plots
from slm.report.paper.plots import draw, draw_panel, plain, pyplot
from slm.report.sweep_figures import (
    Curves,
    loss_curves,
    ratio_figure,
    ratio_panel,
    tokens_figure,
)
from slm.train.curves import Curve


def test_a_dollar_in_a_name_starts_no_formula(tmp_path):
    name = r"$\no$ formula"
    curves = [Curve(name, np.array([0.0, 1, 2]), np.array([3.0, 2, 1]))] * 2
    draw(loss_curves(curves, {name: 2.0}, name), tmp_path / "a.png")
    draw(
        ratio_figure([ratio_panel(name, {name: [(0.5, [1.0])]}, {name: 1.0}, {})]),
        tmp_path / "b.png",
    )
    draw(tokens_figure([[Curves(name, "set", curves, curves)]]), tmp_path / "c.png")
    assert {path.name for path in tmp_path.glob("*.png")} == {"a.png", "b.png", "c.png"}


def test_figure_draws_each_run_the_mean_and_the_lines(tmp_path, kept):
    seen = np.array([0, 1_000_000, 2_000_000])
    curves = [
        Curve("all", seen, np.array([9.0, 5.0, 4.0])),
        Curve("all", seen, np.array([9.0, 7.0, 2.0])),
        Curve("excess", seen, np.array([9.0, 4.0, 1.0])),
    ]
    draw(loss_curves(curves, {"reference": 2.5}, "title", start=1), tmp_path / "f.png")
    axes = kept[0].axes[0]
    labelled = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(labelled["all (3.000)"]) == [6.0, 3.0]
    assert list(labelled["excess (1.000)"]) == [4.0, 1.0]
    assert set(labelled["reference (2.500)"]) == {2.5}
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_ratio_figure_draws_means_bands_and_controls(tmp_path, kept):
    rules = {"excess": [(0.6, [3.0, 5.0]), (0.2, [2.0, 3.0])], "random": [(0.6, [6.0])]}
    panels = [
        ratio_panel("a", rules, {"sigmoid": 2.5}, {"all tokens": 4.5}),
        ratio_panel("b", rules, {}, {"x": 1.0}),
    ]
    draw(ratio_figure(panels), tmp_path / "f.png")
    left, right = kept[0].axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines["excess"].get_xdata()) == [0.2, 0.6]
    assert list(lines["excess"].get_ydata()) == [2.5, 4.0]
    assert list(lines["random"].get_ydata()) == [6.0]
    assert set(lines["all tokens"].get_ydata()) == {4.5}
    assert set(lines["sigmoid"].get_ydata()) == {2.5}
    corners = left.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} >= {(0.2, 2.0), (0.2, 3.0), (0.6, 3.0), (0.6, 5.0)}
    assert lines["excess"].get_color() != lines["random"].get_color()
    assert right.get_title("left") == "b"
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["excess", "random", "sigmoid", "all tokens", "x"]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "f.svg").read_text()


def test_tokens_figure_shows_the_loss_before_training_and_the_controls(tmp_path, kept):
    seen = np.array([0, 1_000_000, 2_000_000])
    curves = [
        Curve("k = 0.2", seen, np.array([9.0, 5.0, 4.0])),
        Curve("k = 0.2", seen, np.array([9.0, 7.0, 2.0])),
        Curve("k = 0.4", seen, np.array([9.0, 4.0, 1.0])),
    ]
    control = [Curve("all tokens", seen, np.array([9.0, 8.0, 7.0]))]
    grid = [
        [Curves("excess", "set", curves, control), Curves("random", "set", curves[2:], control)]
    ]
    draw(tokens_figure(grid), tmp_path / "f.png")
    left, right = kept[0].axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines["k = 0.2"].get_xdata()) == [0, 1_000_000, 2_000_000]
    assert list(lines["k = 0.2"].get_ydata()) == [9.0, 6.0, 3.0]
    assert list(lines["all tokens"].get_ydata()) == [9.0, 8.0, 7.0]
    assert list(lines["before training"].get_ydata()) == [9.0, 9.0]
    other = {line.get_label(): line for line in right.lines}
    assert other["k = 0.4"].get_color() == lines["k = 0.4"].get_color()
    assert lines["k = 0.4"].get_color() != lines["k = 0.2"].get_color()
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["k = 0.2", "k = 0.4", "all tokens", "before training"]


@pytest.mark.usefixtures("sketched")
def test_more_than_four_panels_of_a_set_are_wrapped(tmp_path, kept):
    curve = Curve("k = 0.2", np.array([0, 1, 2]), np.array([9.0, 5.0, 4.0]))
    other = curve._replace(loss=curve.loss + 90)
    grid = [[Curves(f"{i}", "set", [which], []) for i in range(6)] for which in (curve, other)]
    draw(tokens_figure(grid), tmp_path / "f.png")
    shown = [axes for axes in kept[0].axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in shown] == [f"{i}" for i in range(6)] * 2
    assert len({axes.get_ylim() for axes in shown[:6]}) == 1
    assert shown[0].get_ylim()[1] < 10 < 90 < shown[6].get_ylim()[0]


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("end", [9_000, 20_480, 400_000, 3_300_000])
def test_ticks_of_tokens_are_few_and_readable(tmp_path, kept, end):
    curve = Curve("all", np.array([0, end // 2, end]), np.array([9.0, 5.0, 4.0]))
    draw(loss_curves([curve], {}, "title"), tmp_path / "f.png")
    axes = kept[0].axes[0]
    low, high = axes.get_xlim()
    shown = {
        text.get_text(): tick
        for tick, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= tick <= high
    }
    scale = {"k": 1e3, "M": 1e6, "0": 1}
    read = [float(text.rstrip("kM")) * scale[text[-1]] for text in shown]
    assert read == pytest.approx(list(shown.values())) and 3 <= len(shown) <= 6
    assert axes.get_xlabel() == "training tokens seen"


LONG = "excess, combine=mean, references=9041ad67+5e5d26e4, online_reference=79a30635, scope=batch"


def assert_nothing_is_cut(figure: Any) -> None:
    """Legends, titles and labels lie inside the figure, titles do not run into each other."""
    canvas = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    titles = [axes._left_title.get_window_extent(canvas) for axes in figure.axes]
    labels = [axes.yaxis.label.get_window_extent(canvas) for axes in figure.axes]
    for box in [*titles, *labels, *(legend.get_window_extent(canvas) for legend in figure.legends)]:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for one, other in zip(titles, titles[1:], strict=False):
        assert not one.overlaps(other)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_long_labels_are_wrapped_and_not_cut(tmp_path, kept, monkeypatch, number):
    monkeypatch.setattr(plots, "save_picture", lambda *_, **__: None)  # laid out, not written
    seen, loss = np.array([0, 1, 2]), np.array([9.0, 5.0, 4.0])
    names = [f"{i} {LONG}" for i in range(number)]
    curves = [Curve(name, seen, loss) for name in names]
    rules = {name: [(0.5, [3.0])] for name in names}
    panels = [ratio_panel(name, rules, {}, {"all tokens": 2.0}) for name in names]
    draw(ratio_figure(panels), tmp_path / "k.png")
    draw(
        tokens_figure([[Curves(name, "set", curves, []) for name in names]]),
        tmp_path / "tokens.png",
    )
    draw(loss_curves(curves, {"reference": 2.0}, f"{LONG} {LONG}"), tmp_path / "loss.png")
    for figure in kept:
        assert_nothing_is_cut(figure)
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts[0].replace("\n", " ").startswith(names[0])


def test_ticks_that_the_layout_changes_cut_no_label(tmp_path, kept):
    """The empty panel in the middle leaves the others so little room that 5.5 becomes 5.25."""
    line = Series("s", BLUE, np.array([0, 1500]), np.array([5.725, 4.27]))
    numbers = {"class means": 2, "no tokens of L-L": 0, "tokens of H-H": 3}
    panels = [Panel(title, SEEN, LOSS, [line] * count) for title, count in numbers.items()]
    figure = Figure("", panels, size=(2.27, 3.4), lettered=True, own_legends=True)
    draw(figure, tmp_path / "f.png")
    assert_nothing_is_cut(kept[0])


# ---- one panel ----------------------------------------------------------------------------------


def test_names_are_plain():
    assert plain(r"a $\x$ \$") == r"a \$\x\$ \\$"


def drawn(values: list[float], **more: Any) -> Any:
    one = Series("s", BLUE, 10 * np.arange(len(values)), np.array(values), **more)
    _, axes = pyplot().subplots()
    draw_panel(axes, Panel("", SEEN, LOSS, [one]), "title", 3.0)
    return axes


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
def test_a_start_that_dwarfs_the_rest_runs_out_of_the_panel(kept, values, top):
    axes = drawn(values)
    assert list(axes.lines[0].get_ydata()) == pytest.approx(values, nan_ok=True)
    assert top is None or axes.get_ylim()[1] == pytest.approx(top)


def test_a_point_that_stands_out_lies_on_its_line(kept):
    (point,) = [line for line in drawn([3.0, 2.0, 1.0], at=1).lines if line.get_marker() == "o"]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (10, 2.0)
