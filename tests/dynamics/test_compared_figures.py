"""Runs beside each other: an arm is pooled over its seeds, what it does not know is absent."""

from dataclasses import replace

import numpy as np
import pytest

from page_helpers import make_analysis, prose
from slm.dynamics.classes import CLASSES
from slm.dynamics.compared_figures import (
    Compared,
    compared_auc,
    compared_kept_by_signal,
    compared_kept_by_source,
    compared_losses,
    compared_precision,
    compared_shares,
)
from slm.dynamics.figure import Figure, Series
from slm.dynamics.figures import COMPARED, made


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one arm, of which the second has other losses, and a run without references."""
    first = make_analysis(tmp_path / "a", prose(8, 17), "x, seed 0", checkpoints=7)
    second = make_analysis(tmp_path / "b", prose(8, 17), "x, seed 1", checkpoints=4)
    blind = make_analysis(tmp_path / "c", prose(8, 17), "blind", references=False)
    return [replace(first, arm="x"), replace(second, arm="x"), blind]


def series(figure: Figure) -> dict[str, Series]:
    return {one.name: one for one in figure.panels[0].series if not one.is_seed}


def test_a_row_is_the_mean_of_the_seeds_with_their_range(runs):
    found = series(compared_shares(Compared(runs)))
    assert list(found) == list(CLASSES)
    for name, one in found.items():
        shares = [run.shares[name].share for run in runs]
        assert one.x == ["x", "blind"] and one.low is not None and one.high is not None
        assert one.y.tolist() == pytest.approx([np.mean(shares[:2]), shares[2]])
        assert (one.low.tolist(), one.high.tolist()) == (
            [min(shares[:2]), shares[2]],
            [max(shares[:2]), shares[2]],
        )


def test_a_line_is_the_mean_of_the_seeds(runs):
    drawn = compared_losses(Compared(runs)).panels[0].series
    assert [(one.text, one.is_seed, len(one.y)) for one in drawn] == [
        *(("x", True, 7), ("x", True, 4)),
        *(("x", False, 7), ("blind", False, 6)),
    ]
    first, second = runs[:2]
    other = np.interp(first.tokens_seen, second.tokens_seen, second.mean_losses)
    np.testing.assert_allclose(drawn[2].y, (first.mean_losses + other) / 2)


def test_what_an_arm_does_not_know_is_absent(runs):
    found = series(compared_kept_by_source(Compared(runs)))
    kept = [run.kept.by_source[-1] for run in runs[:2]]
    assert list(found) == ["prose", "code"]
    assert found["code"].y[0] == pytest.approx(np.mean([one[1] for one in kept]))
    assert np.isnan(found["code"].y[1])


def test_scores_are_told_apart_where_there_are_labels(runs):
    rows = [
        {"run": run, "part": "all", "score": score, "tokens_seen": seen, "auc": auc + seen / 100}
        | {"precision_at_0.2": auc}
        for run, auc in (("x, seed 0", 0.5), ("x, seed 1", 0.7))
        for seen in (0, 10)
        for score in ("excess_loss", "random")
    ]
    compared = Compared(runs, rows)
    found = series(compared_auc(compared))
    assert [one.text for one in found.values()] == ["high excess loss", "random"]
    assert found["random"].y[0] == pytest.approx(0.7) and np.isnan(found["random"].y[1])
    (precision,) = series(compared_precision(compared)).values()
    assert (precision.text, precision.y[0]) == ("top 20%", pytest.approx(0.6))


def test_without_labels_nothing_is_said_of_signal(runs):
    names = {kind.name for kind in made(COMPARED, Compared(runs))}
    assert compared_losses.__name__ in names
    assert not names & {one.__name__ for one in (compared_auc, compared_kept_by_signal)}
