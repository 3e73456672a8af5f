"""The page's figures hold the analysis's numbers."""

import numpy as np
import pytest

from page_helpers import make_analysis, prose
from slm.dynamics.classes import CLASSES
from slm.report.page.figures import (
    BINS,
    MAX_POINTS,
    compared,
    excess_panels,
    histogram,
    line,
    picks,
    run_figures,
    trajectories,
)


@pytest.fixture
def analysis(tmp_path):
    return make_analysis(tmp_path / "d", prose(8, 17), checkpoints=7)


def lines_of(figure) -> dict:
    return {trace["name"]: trace["y"] for trace in figure["data"]}


def test_many_checkpoints_are_thinned_and_keep_their_ends():
    for count in (1, 3, 64, 200, 201, 1000):
        found = picks(count)
        assert (found[0], found[-1]) == (0, count - 1) and len(found) == min(count, MAX_POINTS)
    assert picks(33, 3).tolist() == [0, 16, 32]
    trace = line("a<b>", np.arange(1000.0), np.arange(1000.0), "var(--c0)")
    assert trace["x"] == trace["y"] and len(trace["x"]) == 200 and trace["x"][-1] == 999
    assert trace["name"] == "a&lt;b&gt;"  # Plotly reads <b>


def test_lines_over_training_are_the_analysis(analysis):
    figures = run_figures(analysis)
    names = ["H→H", "L→H", "H→L", "L→L"]
    for index, name in enumerate(names):
        share = lines_of(figures["shares"])[name]
        assert share[:2] == [None, None]  # no classes of two checkpoints
        assert share[2:] == pytest.approx(analysis.share_history[2:, index], abs=6e-5)
        found = lines_of(figures["losses"])[name]
        assert found == pytest.approx(analysis.class_losses[:, index], abs=6e-5)
        found = lines_of(figures["kept_class"])[name]
        assert found == pytest.approx(analysis.kept.by_class[:, index], abs=6e-5)
    assert lines_of(figures["losses"])["all tokens"] == pytest.approx(
        analysis.mean_losses, abs=6e-5
    )
    sources = lines_of(figures["kept_source"])
    assert set(sources) == {"prose", "code"}
    assert sources["code"] == pytest.approx(analysis.kept.by_source[:, 1], abs=6e-5)
    found = lines_of(figures["kept_loss"])
    assert found["selected"] == pytest.approx(analysis.kept.loss_selected, abs=6e-5)
    assert found["unselected"] == pytest.approx(analysis.kept.loss_unselected, abs=6e-5)


def test_final_shares_have_their_intervals(analysis):
    finals = [t for t in run_figures(analysis)["shares"]["data"] if "error_y" in t]
    assert len(finals) == 4
    for trace, name in zip(finals, CLASSES, strict=True):
        share = analysis.shares[name]
        up, down = trace["error_y"]["array"][0], trace["error_y"]["arrayminus"][0]
        found = [trace["y"][0], trace["y"][0] + up, trace["y"][0] - down]
        assert found == pytest.approx([share.share, share.high, share.low], abs=1e-4)


def test_a_trajectory_is_the_losses_and_the_fitted_line(analysis):
    chosen = np.array([5, 9])
    found = trajectories(analysis, "LH", chosen, 7.0)["data"]
    assert [trace["meta"] for trace in found] == [0, 0, 1, 1]
    assert found[2]["y"] == pytest.approx([column[9] for column in analysis.losses], abs=6e-5)
    ends = [analysis.trajectories.start[9], analysis.trajectories.end[9]]
    assert [found[3]["y"][0], found[3]["y"][-1]] == pytest.approx(ends, abs=6e-5)


def test_histograms_count_every_token_once(analysis):
    panels = excess_panels(analysis)
    assert [panel["title"] for panel in panels] == [
        f"after {seen:,} tokens" for seen in (0, 3000, 6000)
    ]
    for panel, index in zip(panels, (0, 3, 6), strict=True):
        parts = lines_of(panel)
        assert sum(map(sum, parts.values())) == pytest.approx(1, abs=1e-3)
        selected = analysis.chooser.selected(analysis.losses[index], index * 1000)
        assert sum(parts["selected"]) == pytest.approx(selected.mean(), abs=1e-3)
    assert histogram(np.array([-9.0, 0.5, 9.0]), np.linspace(0, 1, BINS + 1)).sum() == 3


def test_without_scores_there_is_nothing_of_selection(tmp_path):
    analysis = make_analysis(tmp_path, prose(2, 9), references=False)
    assert set(run_figures(analysis)) == {"shares", "losses"} and excess_panels(analysis) == []


def test_runs_are_compared_by_name(tmp_path, analysis):
    other = make_analysis(tmp_path / "e", prose(8, 17), "the other", checkpoints=4)
    figures = compared([analysis, other])
    assert [len(y) for y in lines_of(figures["compared_losses"]).values()] == [7, 4]
    shares = lines_of(figures["compared_shares"])["the other"]
    assert shares == pytest.approx([other.shares[name].share for name in CLASSES], abs=6e-5)
    losses = lines_of(figures["compared_class_losses"])["run"]
    assert losses == pytest.approx(analysis.class_losses[-1], abs=6e-5)
