"""What a run wrote, read back."""

import numpy as np
import pytest

from slm.evaluate.losses import WindowLosses
from slm.train.curves import (
    Curve,
    Run,
    final_losses,
    heldout_sets,
    mean_curve,
    read_curve,
    read_window_losses,
    write_window_losses,
)


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


def test_the_mean_of_runs_measured_at_other_points_is_interpolated():
    one = Curve("x", np.array([0.0, 100, 200]), np.array([4.0, 3.0, 2.0]))
    other = Curve("x", np.array([0.0, 200]), np.array([8.0, 4.0]))
    mean = mean_curve([one, other])
    assert mean.tokens_seen.tolist() == [0, 100, 200] and mean.loss.tolist() == [6.0, 4.5, 3.0]


def test_windows_are_kept_before_training_and_at_the_latest_measurement(tmp_path):
    def losses(nats: float) -> WindowLosses:
        columns = ([0, 7], [nats, 1 / 3], [3, 2], [9, 8])
        return WindowLosses(*(np.array(column) for column in columns))

    assert read_window_losses(tmp_path) == {}
    for tokens, nats in ((0, 9.0), (100, 5.0), (200, 4.0)):
        write_window_losses(tmp_path, tokens, {"a/b": losses(nats), "c": losses(2 * nats)})
    found = read_window_losses(tmp_path)
    assert list(found) == [("a/b", 0), ("c", 0), ("a/b", 200), ("c", 200)]
    for (name, tokens), got in found.items():
        nats = {0: 9.0, 200: 4.0}[tokens] * (2 if name == "c" else 1)
        assert all((x == y).all() for x, y in zip(got, losses(nats), strict=True))
    write_window_losses(tmp_path, 0, {"c": losses(1.0)})  # begun anew
    assert list(read_window_losses(tmp_path)) == [("c", 0)]


def test_kept_by_source_is_the_mean_of_the_logged_steps(tmp_path):
    assert Run(tmp_path).kept_by_source == {}
    (tmp_path / "train.csv").write_text(
        "step,slm/kept_frac,slm/kept_frac/web,slm/kept_frac/a/b,slm/kept_frac/none\n"
        "1,0.5,0.25,,\n2,0.5,0.75,0.5,\n"
    )
    assert Run(tmp_path).kept_by_source == {"web": 0.5, "a/b": 0.5}  # and none where none is
