"""A sweep's figures: means and ranges over seeds, axes and colours that panels share."""

import numpy as np
import pytest

from run_helpers import make_run
from slm.dynamics.figure import Panel
from slm.errors import UserError
from slm.report.arms import arms_of, read_runs
from slm.report.baselines import BEFORE, before_training
from slm.report.sweep_figures import (
    MOST_CURVES,
    MOST_LINES,
    Curves,
    Sweep,
    loss_differences,
    loss_vs_k,
    panel_curves,
    ratio_panel,
    tokens_figure,
)
from slm.report.table import control_runs
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
    assert first.y.bounds == second.y.bounds == (1.72, 9.28)
    (mean,) = [one for one in first.series if one.text == "k = 0.2" and not one.is_seed]
    assert mean.x.tolist() == [0, 100, 200] and mean.y.tolist() == [9.0, 5.0, 3.5]
    before = first.series[-1]
    assert (before.text, before.y.tolist()) == ("before training", [9.0, 9.0])
    assert first.note == "Before training: 9.000."
    colours = {one.text: one.colour for one in [*first.series, *second.series]}
    assert colours["k = 0.2"] == mean.colour != colours["k = 0.6"]


def panel_of(seen: list[float], losses: list[float]) -> Panel:
    curve = Curve("k", np.array(seen), np.array(losses))
    return tokens_figure([[Curves("a", "a", [curve], [])]]).panels[0]


def test_the_axis_leaves_the_first_tenth_of_training_out():
    panel = panel_of([0.0, 10, 50, 100, 500, 1000], [11.0, 9, 8, 4, 3, 2])
    assert panel.series[0].y.tolist() == [11.0, 9.0, 8.0, 4.0, 3.0, 2.0]  # zooming out shows them
    assert panel.y.bounds == (1.92, 4.08)


def test_of_two_measurements_everything_is_shown():
    panel = panel_of([0.0, 1000], [11.0, 9])
    assert panel.series[0].y.tolist() == [11.0, 9.0] and panel.y.bounds is None


def test_a_run_that_was_not_measured_before_training_says_nothing_of_it():
    panel = panel_of([10.0, 500, 1000], [11.0, 9, 8])
    assert [one.text for one in panel.series] == ["k"] and panel.note == ""


def test_where_lines_are_many_a_rule_is_a_panel(tmp_path):
    rates = range(MOST_LINES + 1)
    for rate in rates:
        make_run(tmp_path / f"{rate}", identity={"lr": rate})
    arms = arms_of(read_runs([str(tmp_path)])[0])
    (many,), few = panel_curves("a", arms), panel_curves("a", arms[:2])
    assert many.title == "excess, a"
    assert [curve.label for curve in many.curves] == [f"k = 0.5, lr={rate}" for rate in rates]
    assert [found.title for found in few] == ["excess, lr=0, a", "excess, lr=1, a"]
    assert [curve.label for found in few for curve in found.curves] == ["k = 0.5"] * 2


def test_all_tokens_alone_are_one_line(tmp_path):
    make_run(tmp_path / "a", "All", None)
    (found,) = panel_curves("a", arms_of(read_runs([str(tmp_path)])[0]))
    assert found.title == "all tokens, a" and found.controls == []
    assert [curve.label for curve in found.curves] == ["all tokens"]


def test_a_panel_of_many_runs_shows_their_means_alone():
    seen = np.array([0.0, 100, 200])
    runs = [Curve(f"k = {i % 30}", seen, np.array([9.0, 5, i])) for i in range(MOST_CURVES + 20)]
    (panel,) = tokens_figure([[Curves("a", "a", runs, [])]]).panels
    assert [one.text for one in panel.series] == [
        *(f"k = {i}" for i in range(30)),
        "before training",
    ]


def test_ratios_that_are_many_are_not_all_named():
    few, many = ([(i / 20, [3.0]) for i in range(count)] for count in (3, 20))
    assert ratio_panel("a", {"x": few}, {}, {}).x.ticks == [0.0, 0.05, 0.1]
    assert not ratio_panel("a", {"x": many}, {}, {}).x.ticks


def test_differences_stand_in_order_with_their_intervals_and_seeds(tmp_path):
    for seed in (0, 1):
        for name, ratio, final in (("low", 0.3, 3.0), ("high", 0.6, 4.0), ("all", 1.0, 3.5)):
            identity = {"init_from": "f00d"}
            make_run(tmp_path / f"{name}{seed}", "Excess", ratio, seed, final + seed, identity)
    runs = read_runs([str(tmp_path)])[0]
    arms, before = arms_of(runs), before_training(runs, ["a"])
    sweep = Sweep(arms, before, control_runs(arms), ["a"])
    (panel,) = loss_differences(sweep).panels
    mean, seeds = panel.series
    assert list(mean.x) == ["excess k = 0.3", "excess k = 0.6"]  # 9 before training: far off
    assert mean.low is not None and mean.y.tolist() == mean.low.tolist() == [-0.5, 0.5]
    assert list(zip(seeds.x, seeds.y, strict=True)) == [
        *[("excess k = 0.3", -0.5)] * 2,
        *[("excess k = 0.6", 0.5)] * 2,
    ]
    assert ratio_lines(sweep) == {"excess", "all tokens"}
    both = Sweep(arms, before_training(runs, ["a", "b"]), control_runs(arms), ["a", "b"])
    notes = [panel.note for panel in loss_differences(both).panels]
    assert notes == [f"Before training, {start}, is far off." for start in ("+5.000", "+10.000")]
    near = before[0].runs[0]._replace(curves={"a": Curve("", np.zeros(1), np.array([5.0]))})
    sweep = sweep._replace(baselines=[before[0]._replace(runs=[near])])
    assert list(loss_differences(sweep).panels[0].series[0].x)[-1] == BEFORE
    assert ratio_lines(sweep) == {"excess", "all tokens", BEFORE}
    with pytest.raises(UserError, match="beside one on all tokens"):
        loss_differences(sweep._replace(controls=[]))


def test_a_line_has_its_dashes_in_every_panel(tmp_path):
    make_run(tmp_path / "half", "Excess", 0.5, final=3.0)
    arms = arms_of(read_runs([str(tmp_path)])[0])
    baselines = []
    for label, ends in ((BEFORE, (3.5, 99.0)), ("reference", (3.4, 5.0))):
        curves = {"ab"[i]: Curve("", np.zeros(1), np.array([end])) for i, end in enumerate(ends)}
        baselines.append(
            arms[0]._replace(label=label, runs=[arms[0].runs[0]._replace(curves=curves)])
        )
    panels = loss_vs_k(Sweep(arms, baselines, [], ["a", "b"])).panels
    near, far = ({one.text: one.dash for one in panel.series} for panel in panels)
    assert near.keys() - far.keys() == {BEFORE}
    assert near["reference"] == far["reference"] != near[BEFORE]


def ratio_lines(sweep: Sweep) -> set[str]:
    return {one.text for one in loss_vs_k(sweep).panels[0].series}


@pytest.mark.parametrize(("points", "mark"), [(2, "circle"), (30, "")])
def test_points_are_marked_where_they_are_few(points, mark):
    seen = np.linspace(0.0, 100, points)
    curves, control = ([Curve(name, seen, seen + 1)] for name in ("k = 0.2", "all tokens"))
    (panel,) = tokens_figure([[Curves("x, a", "a", curves, control)]]).panels
    found = {one.name: one.mark for one in panel.series}
    assert (found["k = 0.2"], found["all tokens"]) == (mark, mark)
