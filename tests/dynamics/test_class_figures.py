"""Figures of the classes: every number is counted here again, in plain loops over the losses."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from figure_helpers import (
    Make,
    assert_drawn,
    assert_files,
    lines_of,
    losses_of,
    make_analysis,
)
from slm.dynamics.analysis import Analysis
from slm.dynamics.class_figures import (
    Shown,
    classes,
    loss_by_class,
    share_text,
    shares,
    trajectories,
)
from slm.dynamics.classes import CLASSES
from slm.dynamics.figure import Figure
from slm.report.paper.plots import draw


@pytest.fixture
def make(tmp_path) -> Make:
    return partial(make_analysis, tmp_path)


def class_figure(run: Analysis, path: Path, **more: Any) -> None:
    draw(classes(Shown(run), **more), path)


def series_of(figure: Figure) -> dict:
    return {one.text: one for one in figure.panels[0].series if one.kind == "line"}


# ---- for print ----------------------------------------------------------------------------------


def test_classes_and_tokens_are_counted_by_hand(make, tmp_path, kept):
    run = make(losses=losses_of(1, 9))
    class_figure(run, tmp_path / "c.png", num_tokens=2)
    assert_files(tmp_path / "c.png")
    lines, label = lines_of(tmp_path / "c.png"), run.trajectories.label
    for index, name in enumerate(CLASSES):
        for at, column in enumerate(run.losses):
            mine = [float(loss) for loss, kind in zip(column, label, strict=True) if kind == index]
            assert lines["classes", name][100_000 * at] == pytest.approx(np.mean(mine))
    for number, name in ((1, "LL"), (2, "HH")):
        tokens = {int(k[1]): line for k, line in lines.items() if k[0] == name}
        assert len(tokens) == 2
        for target, line in tokens.items():
            assert label[target] == CLASSES.index(name)
            assert list(line.values()) == [column[target] for column in run.losses]
        assert_drawn(kept[0].axes[number], list(tokens.values()))
    assert_drawn(kept[0].axes[0], [lines["classes", name] for name in CLASSES])
    shown = [text.get_text() for text in kept[0].axes[0].get_legend().get_texts()]
    expected = [f"{100 * np.mean(label == index):.0f}" for index in range(4)]
    assert shown == [
        f"{name[0]}\u2192{name[1]} ({share}% of tokens)"
        for name, share in zip(CLASSES, expected, strict=True)
    ]


def test_a_class_of_few_tokens_is_not_said_to_have_none():
    shares = (0.0001, 0.0099, 0.01, 0.256, 0.999, 1.0)
    assert [share_text(share) for share in shares] == [
        *("under 1%", "under 1%", "1%", "26%", "100%", "100%")
    ]


@pytest.mark.usefixtures("sketched")
def test_the_tokens_shown_are_among_the_most_restless(make, tmp_path):
    losses = losses_of(0, 9)
    restless = [3, 7]  # kind 3: L->L
    losses[::2, restless] += 0.4
    class_figure(make(losses=losses), tmp_path / "c.png", num_tokens=2)
    assert {k[1] for k in lines_of(tmp_path / "c.png") if k[0] == "LL"} == {"3", "7"}


@pytest.mark.usefixtures("sketched")
def test_a_class_without_tokens_has_no_lines(make, tmp_path, kept):
    losses = losses_of(0, 4)
    losses[:, :] = np.linspace(5, 1, 4)[:, None]
    class_figure(make(losses=losses), tmp_path / "c.png")
    assert set(lines_of(tmp_path / "c.png")) == {("classes", "HL")}
    assert kept[0].axes[1].get_title("left") == "(b) no tokens of L\u2192L"


@pytest.mark.usefixtures("sketched")
def test_of_many_checkpoints_a_token_shows_some(make, tmp_path):
    class_figure(make(losses=losses_of(0, 60)), tmp_path / "c.png", num_tokens=1)
    lines = {key[0]: line for key, line in lines_of(tmp_path / "c.png").items()}
    assert len(lines["classes"]) == 60 and len(lines["HH"]) == 48
    assert min(lines["HH"]) == 0 and max(lines["HH"]) == 5_900_000


# ---- on the page --------------------------------------------------------------------------------


def test_lines_over_training_are_the_analysis(make):
    run = make(losses=losses_of(0, 7))
    found, losses = series_of(shares(Shown(run))), series_of(loss_by_class(Shown(run)))
    for index, name in enumerate(["H→H", "L→H", "H→L", "L→L"]):
        assert np.isnan(found[name].y[:2]).all()  # no classes of two checkpoints
        np.testing.assert_array_equal(found[name].y, run.share_history[:, index])
        np.testing.assert_array_equal(losses[name].y, run.class_losses[:, index])
    np.testing.assert_array_equal(losses["all tokens"].y, run.mean_losses)


def test_final_shares_have_their_intervals(make):
    run = make()
    finals = [one for one in shares(Shown(run)).panels[0].series if one.kind == "points"]
    for one, name in zip(finals, CLASSES, strict=True):
        share = run.shares[name]
        assert one.low is not None and one.high is not None
        assert [*one.y, *one.low, *one.high] == [share.share, share.low, share.high]


def test_a_trajectory_is_the_losses_and_the_fitted_line(make):
    run = make()
    figure = trajectories(Shown(run))
    assert len({panel.y.bounds for panel in figure.panels}) == 1
    for index, panel in enumerate(figure.panels):
        pairs = list(zip(panel.series[::2], panel.series[1::2], strict=True))
        assert len(pairs) == 5
        for losses, fitted in pairs:
            target = losses.target
            assert target is not None and run.trajectories.label[target] == index
            assert losses.y.tolist() == [column[target] for column in run.losses]
            ends = run.trajectories.start[target], run.trajectories.end[target]
            assert (fitted.y[0], fitted.y[-1]) == pytest.approx(ends)
