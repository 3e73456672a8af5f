"""The figure holds the numbers it was given; the page shows text as it is and runs none of it."""

from typing import Any

import numpy as np
import pytest

from slm.report.paper.plots import RatioPanel, TokensPanel, loss_figure, ratio_figure, tokens_figure
from slm.train.curves import Curve, final_losses, heldout_sets, mean_curve, read_curve


def test_read_curve_reads_one_set_and_skips_rows_without_it(tmp_path):
    (tmp_path / "heldout.csv").write_text(
        "step,tokens_seen,heldout/a/loss,heldout/b/loss\n0,0,5.5,4\n1,128,,3\n2,256,5.25,2\n"
    )
    curve = read_curve(tmp_path, "x", "a")
    assert curve.tokens_seen.tolist() == [0, 256] and curve.loss.tolist() == [5.5, 5.25]


def test_final_losses_are_the_last_of_each_set(tmp_path):
    assert final_losses(tmp_path) == {}
    (tmp_path / "heldout.csv").write_text(
        "step,tokens_seen,heldout/a/loss,heldout/a/bits_per_byte,heldout/b/loss\n"
        "0,0,5.5,1,4\n1,128,5.25,1,\n2,256,5,1,2\n"
    )
    assert final_losses(tmp_path) == {"a": 5.0, "b": 2.0}


@pytest.mark.parametrize("name", ["a/b", "loss", "x/loss", "heldout/x", "a b|c$d"])
def test_a_set_may_have_any_name(tmp_path, name):
    columns = ["step", "tokens_seen", f"heldout/{name}/loss", f"heldout/{name}/bits_per_byte"]
    (tmp_path / "heldout.csv").write_text(",".join(columns) + "\n0,0,5.5,1\n1,128,5.25,1\n")
    assert heldout_sets(tmp_path) == [name]
    assert final_losses(tmp_path) == {name: 5.25}


def test_a_dollar_in_a_name_starts_no_formula(tmp_path):
    name = r"$\no$ formula"
    curves = [Curve(name, np.array([0.0, 1, 2]), np.array([3.0, 2, 1]))] * 2
    loss_figure(curves, {name: 2.0}, name, tmp_path / "a.png")
    ratio_figure([RatioPanel(name, {name: [(0.5, [1.0])]}, {name: 1.0}, {})], tmp_path / "b.png")
    tokens_figure([[TokensPanel(name, curves, curves)]], tmp_path / "c.png")
    assert {path.name for path in tmp_path.glob("*.png")} == {"a.png", "b.png", "c.png"}


def test_the_mean_of_runs_measured_at_other_points_is_interpolated():
    one = Curve("x", np.array([0.0, 100, 200]), np.array([4.0, 3.0, 2.0]))
    other = Curve("x", np.array([0.0, 200]), np.array([8.0, 4.0]))
    mean = mean_curve([one, other])
    assert mean.tokens_seen.tolist() == [0, 100, 200] and mean.loss.tolist() == [6.0, 4.5, 3.0]


def test_figure_draws_each_run_the_mean_and_the_lines(tmp_path, kept):
    seen = np.array([0, 1_000_000, 2_000_000])
    curves = [
        Curve("all", seen, np.array([9.0, 5.0, 4.0])),
        Curve("all", seen, np.array([9.0, 7.0, 2.0])),
        Curve("excess", seen, np.array([9.0, 4.0, 1.0])),
    ]
    loss_figure(curves, {"reference": 2.5}, "title", tmp_path / "f.png", start=1)
    axes = kept[0].axes[0]
    labelled = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(labelled["all (3.000)"]) == [6.0, 3.0]
    assert list(labelled["excess (1.000)"]) == [4.0, 1.0]
    assert set(labelled["reference (2.500)"]) == {2.5}
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_ratio_figure_draws_means_bands_and_controls(tmp_path, kept):
    rules = {"excess": [(0.6, [3.0, 5.0]), (0.2, [2.0, 3.0])], "random": [(0.6, [6.0])]}
    panels = [
        RatioPanel("a", rules, {"sigmoid": 2.5}, {"all tokens": 4.5}),
        RatioPanel("b", rules, {}, {"x": 1.0}),
    ]
    ratio_figure(panels, tmp_path / "f.png")
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


def test_tokens_figure_leaves_out_the_first_point_and_shows_the_controls(tmp_path, kept):
    seen = np.array([0, 1_000_000, 2_000_000])
    curves = [
        Curve("k = 0.2", seen, np.array([9.0, 5.0, 4.0])),
        Curve("k = 0.2", seen, np.array([9.0, 7.0, 2.0])),
        Curve("k = 0.4", seen, np.array([9.0, 4.0, 1.0])),
    ]
    control = [Curve("all tokens", seen, np.array([9.0, 8.0, 7.0]))]
    grid = [[TokensPanel("excess", curves, control), TokensPanel("random", curves[2:], control)]]
    tokens_figure(grid, tmp_path / "f.png")
    left, right = kept[0].axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines["k = 0.2"].get_xdata()) == [1_000_000, 2_000_000]
    assert list(lines["k = 0.2"].get_ydata()) == [6.0, 3.0]
    assert list(lines["all tokens"].get_ydata()) == [8.0, 7.0]
    other = {line.get_label(): line for line in right.lines}
    assert (other["k = 0.4"].get_color() == lines["k = 0.4"].get_color()).all()
    assert (lines["k = 0.4"].get_color() != lines["k = 0.2"].get_color()).any()
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["k = 0.2", "k = 0.4", "all tokens"]


def test_more_than_four_panels_of_a_set_are_wrapped(tmp_path, kept):
    curve = Curve("k = 0.2", np.array([0, 1, 2]), np.array([9.0, 5.0, 4.0]))
    other = curve._replace(loss=curve.loss + 90)
    grid = [[TokensPanel(f"{i}", [which], []) for i in range(6)] for which in (curve, other)]
    tokens_figure(grid, tmp_path / "f.png")
    shown = [axes for axes in kept[0].axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in shown] == [f"{i}" for i in range(6)] * 2
    assert len({axes.get_ylim() for axes in shown[:6]}) == 1
    assert shown[0].get_ylim()[1] < 10 < 90 < shown[6].get_ylim()[0]


@pytest.mark.parametrize("end", [9_000, 20_480, 400_000, 3_300_000])
def test_ticks_of_tokens_are_few_and_readable(tmp_path, kept, end):
    curve = Curve("all", np.array([0, end // 2, end]), np.array([9.0, 5.0, 4.0]))
    loss_figure([curve], {}, "title", tmp_path / "f.png")
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
    """Legends and titles lie inside the figure, titles do not run into each other."""
    canvas = figure.canvas.get_renderer()
    titles = [axes._left_title.get_window_extent(canvas) for axes in figure.axes]
    for box in [*titles, *(legend.get_window_extent(canvas) for legend in figure.legends)]:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for one, other in zip(titles, titles[1:], strict=False):
        assert not one.overlaps(other)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_long_labels_are_wrapped_and_not_cut(tmp_path, kept, number):
    seen, loss = np.array([0, 1, 2]), np.array([9.0, 5.0, 4.0])
    names = [f"{i} {LONG}" for i in range(number)]
    curves = [Curve(name, seen, loss) for name in names]
    rules = {name: [(0.5, [3.0])] for name in names}
    panels = [RatioPanel(name, rules, {}, {"all tokens": 2.0}) for name in names]
    ratio_figure(panels, tmp_path / "k.png")
    tokens_figure([[TokensPanel(name, curves, []) for name in names]], tmp_path / "tokens.png")
    loss_figure(curves, {"reference": 2.0}, f"{LONG} {LONG}", tmp_path / "loss.png")
    for figure in kept:
        assert_nothing_is_cut(figure)
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts[0].replace("\n", " ").startswith(names[0])
