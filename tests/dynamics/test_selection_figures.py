"""Figures of selection: every number is counted here again, in plain loops over the losses."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from figure_helpers import (
    ALL,
    RANDOM,
    Make,
    assert_drawn,
    assert_files,
    lines_of,
    losses_of,
    make_analysis,
    masks_of,
)
from page_helpers import make_analysis as make_page_analysis
from page_helpers import prose, truth_rows
from slm.dynamics.analysis import Analysis, histogram
from slm.dynamics.class_figures import Shown
from slm.dynamics.selection_figures import (
    BINS,
    auc_of_scores,
    common_checkpoints,
    control_of,
    excess_loss,
    kept_frac_by_class,
    kept_frac_by_signal,
    kept_frac_by_source,
    loss_by_selection,
    perplexity,
    selection,
    spread_checkpoints,
)
from slm.errors import UserError
from slm.report.paper.plots import draw
from slm.train.curves import Curve


@pytest.fixture
def make(tmp_path) -> Make:
    return partial(make_analysis, tmp_path)


def selection_figure(
    run: Analysis,
    control: Analysis | None,
    path: Path,
    heldout: Sequence[Curve] = (),
    name: str = "held-out text",
) -> None:
    draw(selection(Shown(run, [] if control is None else [control], heldout, name)), path)


def perplexity_figure(run: Analysis, path: Path, **more: Any) -> None:
    draw(perplexity(Shown(run), **more), path)


def values_of(figure) -> dict[str, np.ndarray]:
    return {one.text: one.y for one in figure.panels[0].series}


# ---- selection ----------------------------------------------------------------------------------


def test_selection_is_counted_by_hand_in_both_runs(make, tmp_path, kept):
    run = make(losses=losses_of(0, 5))
    control = make("all tokens", ALL, losses_of(7, 3), every=200_000, references=False)
    curves = [
        Curve("run", np.array([0, 100]), np.array([3.0, 2.0])),
        Curve("all tokens", np.array([0, 300]), np.array([3.0, 2.5])),
    ]
    selection_figure(run, control, tmp_path / "s.png", curves, "curated text")
    assert_files(tmp_path / "s.png")
    lines = lines_of(tmp_path / "s.png")
    for at, mask in enumerate(masks_of(run)):
        column = run.losses[at].astype(np.float64)
        assert lines["selected", "run"][100_000 * at] == pytest.approx(column[mask].mean())
        assert lines["unselected", "run"][100_000 * at] == pytest.approx(column[~mask].mean())
    for at in range(3):  # the control's checkpoint i is the run's 2 i
        mask, column = masks_of(run)[2 * at], control.losses[at].astype(np.float64)
        seen = 200_000 * at
        assert lines["selected", "all tokens"][seen] == pytest.approx(column[mask].mean())
        assert lines["unselected", "all tokens"][seen] == pytest.approx(column[~mask].mean())
    assert list(lines["selected", "all tokens"]) == [0, 200_000, 400_000]
    assert lines["heldout", "all tokens"] == {0: 3.0, 300: 2.5}
    titles = [axes.get_title("left") for axes in kept[0].axes]
    assert titles == ["(a) selected", "(b) curated text", "(c) unselected"]
    for axes, panel in zip(kept[0].axes, ("selected", "heldout", "unselected"), strict=True):
        assert_drawn(axes, [lines[panel, "run"], lines[panel, "all tokens"]])
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["run", "all tokens"]


@pytest.mark.usefixtures("sketched")
def test_a_run_alone_has_two_panels_and_nothing_where_all_is_selected(make, tmp_path, kept):
    run = make(start=250_000)
    selection_figure(run, None, tmp_path / "s.png")
    lines = lines_of(tmp_path / "s.png")
    assert set(lines) == {("selected", "run"), ("unselected", "run")}
    assert list(lines["selected", "run"]) == [0, 100_000, 200_000, 300_000, 400_000]
    assert list(lines["unselected", "run"]) == [300_000, 400_000]
    assert lines["selected", "run"][0] == pytest.approx(run.losses[0].mean(dtype=np.float64))
    assert len(kept[0].axes) == 2


@pytest.mark.parametrize("field", ["corpus_fingerprint", "windows_sha256"])
def test_a_control_on_other_tokens_is_refused(make, field):
    run, control = make(), make("control", ALL, plan={field: "other"})
    expected = f"{field} is {run.store.plan[field]} and other"
    with pytest.raises(UserError, match=expected):
        common_checkpoints(run, control)
    assert control_of(run, [control]) is None


def test_a_control_at_other_times_is_refused(make):
    run, control = make(), make("control", ALL, losses_of(1, 3), every=70_000)
    expected = (
        r"1 checkpoints at the same tokens_seen, 2 are needed: "
        r"\[0, 100,000, 200,000, 300,000, \.\.\.\] and \[0, 70,000, 140,000\]"
    )
    with pytest.raises(UserError, match=expected):
        common_checkpoints(run, control)


@pytest.mark.usefixtures("sketched")
def test_names_must_tell_the_lines_apart(make, tmp_path):
    run, curve = make(), Curve("x", np.array([0, 1]), np.array([1.0, 2.0]))
    selection_figure(run, None, tmp_path / "s.png", [curve])  # a curve of neither run
    assert {panel for panel, _ in lines_of(tmp_path / "s.png")} == {"selected", "unselected"}
    with pytest.raises(UserError, match="both runs are named run"):
        common_checkpoints(run, run)


def test_the_control_has_the_runs_own_seed(make):
    runs = [make("all 0", ALL), make("all 1", ALL), make("excess 0.5")]
    for analysis, seed in zip(runs, (0, 1, 1), strict=True):
        analysis.store.plan["run"] = analysis.store.plan["run"] | {"seed": seed}
    assert control_of(runs[2], runs) is runs[1]
    runs[2].store.plan["run"]["seed"] = 7
    assert control_of(runs[2], runs) is runs[0]


# ---- perplexity ---------------------------------------------------------------------------------


def test_perplexity_of_each_set_is_counted_by_hand(make, tmp_path, kept):
    run = make(losses=losses_of(3, 7))
    perplexity_figure(run, tmp_path / "p.png", num=3)
    assert_files(tmp_path / "p.png")
    lines, masks = lines_of(tmp_path / "p.png", "perplexity"), masks_of(run)
    assert [series for _, series in lines] == ["200000", "400000", "600000"]
    for choice in (2, 4, 6):
        for at, column in enumerate(run.losses):
            expected = np.exp(np.mean(column.astype(np.float64)[masks[choice]]))
            found = lines["selected", f"{100_000 * choice}"][100_000 * at]
            assert found == pytest.approx(expected)
    axes = kept[0].axes[0]
    assert_drawn(axes, list(lines.values()))
    points = [line for line in axes.lines if line.get_marker() == "o"]
    for point, choice in zip(points, (2, 4, 6), strict=True):
        seen = 100_000 * choice
        assert point.get_xdata()[0] == seen
        assert point.get_ydata()[0] == pytest.approx(lines["selected", f"{seen}"][seen])
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["200k", "400k", "600k"]


def test_checkpoints_are_spread_over_those_at_which_the_rule_selects(make):
    run = make(losses=losses_of(0, 11))
    assert spread_checkpoints(run, 5).tolist() == [2, 4, 6, 8, 10]
    assert spread_checkpoints(run, 1).tolist() == [10]
    late = make("late", losses=losses_of(0, 11), start=550_000)
    assert spread_checkpoints(late, 5).tolist() == [7, 8, 9, 10]
    assert spread_checkpoints(make("few", losses=losses_of(0, 3)), 9).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="starts after 500,000 tokens, .* has seen 400,000"):
        spread_checkpoints(make("never", start=500_000), 5)


# ---- on the page --------------------------------------------------------------------------------


def test_lines_over_training_are_the_analysis(tmp_path):
    run = make_page_analysis(tmp_path / "d", prose(8, 17), checkpoints=7)
    assert run.kept is not None
    for index, name in enumerate(["H→H", "L→H", "H→L", "L→L"]):
        found = values_of(kept_frac_by_class(Shown(run)))[name]
        np.testing.assert_array_equal(found, run.kept.by_class[:, index])
    sources = values_of(kept_frac_by_source(Shown(run)))
    assert set(sources) == {"prose", "code"}
    np.testing.assert_array_equal(sources["code"], run.kept.by_source[:, 1])
    found = values_of(loss_by_selection(Shown(run)))
    np.testing.assert_array_equal(found["selected"], run.kept.loss_selected)
    np.testing.assert_array_equal(found["unselected"], run.kept.loss_unselected)
    np.testing.assert_array_equal(found["all tokens"], run.mean_losses)


def test_a_rule_that_takes_everything_has_no_line_of_what_it_leaves(make):
    run = make("all tokens", ALL)
    assert set(values_of(loss_by_selection(Shown(run)))) == {"selected", "all tokens"}
    for panel in excess_loss(Shown(run)).panels:
        assert [one.text for one in panel.series] == ["selected"]


def test_histograms_count_every_token_once(tmp_path):
    run = make_page_analysis(tmp_path / "d", prose(8, 17), checkpoints=7)
    panels = excess_loss(Shown(run)).panels
    assert [panel.title for panel in panels] == [f"after {n:,} tokens" for n in (0, 3000, 6000)]
    assert run.chooser is not None
    for panel, index in zip(panels, (0, 3, 6), strict=True):
        parts = {one.text: one.y.sum() for one in panel.series}
        assert sum(parts.values()) == pytest.approx(1)
        selected = run.chooser.selected(run.losses[index], index * 1000)
        assert parts["selected"] == pytest.approx(selected.mean())
    assert histogram(np.array([-9.0, 0.5, 9.0]), np.linspace(0, 1, BINS + 1)).sum() == 3


def test_a_line_a_score_of_all_labelled_tokens(make):
    (panel,) = auc_of_scores(Shown(make(), truth=truth_rows("a"))).panels
    assert [one.text for one in panel.series] == ["high excess loss", "random"]
    assert panel.series[0].x.tolist() == [0, 1000, 2000]
    assert panel.series[0].y == pytest.approx([0.6, 0.7, 0.8])
    assert panel.series[1].y.tolist() == [0.5, 0.5, 0.5]
    assert len({one.mark for one in panel.series}) == 2


def test_what_is_kept_of_signal_and_noise_is_the_analysis_own(make):
    run = make()
    by_signal = np.linspace(0, 1, 2 * len(run.tokens_seen)).reshape(-1, 2)
    run = replace(run, kept=replace(run.kept, by_signal=by_signal))
    found = values_of(kept_frac_by_signal(Shown(run, truth=truth_rows("a"))))
    assert list(found) == ["signal", "noise"]
    np.testing.assert_array_equal(found["signal"], by_signal[:, 1])
    np.testing.assert_array_equal(found["noise"], by_signal[:, 0])


def test_what_cannot_be_drawn_says_why(make):
    run, blind = make(), make("blind", references=False)
    for figure in (auc_of_scores, kept_frac_by_signal):
        with pytest.raises(UserError, match="has no labels of signal and noise"):
            figure(Shown(run))
    for figure in (kept_frac_by_class, kept_frac_by_source, loss_by_selection, selection):
        with pytest.raises(UserError, match=r"has no reference scores, excess k = 0\.5 needs them"):
            figure(Shown(blind))
    with pytest.raises(UserError, match="has no reference losses"):
        excess_loss(Shown(blind))
    for rule, name in ((ALL, "all tokens"), (RANDOM, "random k = 0.5")):
        other = make(name, rule)
        with pytest.raises(UserError, match=f"selected do not apply to {name}"):
            perplexity(Shown(other))
