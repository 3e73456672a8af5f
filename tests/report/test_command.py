"""Tables and arms from run folders made by hand, with numbers that are known."""

import csv
import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from figure_helpers import assert_files
from page_helpers import make_analysis, prose
from run_helpers import BUDGET, make_run
from run_helpers import compose_report as config
from slm.dynamics.analysis import analyse
from slm.dynamics.trajectories import TrajectoryStore
from slm.dynamics.truth import truth_rows
from slm.errors import UserError
from slm.report import command as report_module
from slm.report.analyses import Store, all_stores, chosen_stores, read_analyses
from slm.report.command import report
from slm.report.table import REACH_NOTE

pytestmark = pytest.mark.usefixtures("sketched")


def make_sweep(folder: Path) -> Path:
    """Two rules at k = 0.5 and 1, two seeds; 1.0 is training on all tokens under either."""
    for rule, offset in (("Excess", 0.0), ("Random", 1.5)):
        for seed in (0, 1):
            make_run(folder / f"{rule}{seed}half", rule, 0.5, seed, 3.0 + offset + seed / 4)
            make_run(folder / f"{rule}{seed}one", rule, 1.0, seed, 4.0 + seed / 2)
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    return make_sweep(tmp_path / "sweep")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The report of a sweep of which one run has token losses; its pictures are drawn."""
    folder = tmp_path_factory.mktemp("whole")
    runs = make_sweep(folder / "sweep")
    analysis = make_analysis(runs / "Excess0half" / "dynamics" / "tokens", prose(6, 9))
    analysis.store.write_classes(analysis.trajectories, [{"class": "HH"}], 0.7, 2.5)
    report(**config(runs, folder / "out"))
    return folder / "out"


def test_the_table_has_mean_and_spread_and_tokens_to_reach(out):
    with open(out / "table.csv", newline="") as file:
        rows = {(row["arm"], row["set"]): row for row in csv.DictReader(file)}
    assert [arm for arm, name in rows if name == "a"] == [
        "excess k = 0.5", "excess k = 1", "random k = 0.5", "random k = 1",
    ]  # fmt: skip
    found = rows["excess k = 0.5", "b"]
    assert (found["rule"], found["select_ratio"], found["seeds"]) == ("excess", "0.5", "2")
    assert [float(found[key]) for key in ("mean", "low", "high")] == [6.25, 6.0, 6.5]
    assert (found["tokens_seen"], found["tokens_selected"]) == ("400", "200")
    # all tokens end at 4.25 on `a`: from 5 at 200 to 3 or 3.25 at 400
    by_hand = (200 + 200 * 0.75 / 2 + 200 + 200 * 0.75 / 1.75) / 2
    assert int(rows["excess k = 0.5", "a"]["tokens_to_all_tokens_loss"]) == round(by_hand)
    assert rows["random k = 0.5", "a"]["tokens_to_all_tokens_loss"] == ""  # 4.5 and 4.75
    assert (
        rows["random k = 1", "a"]["tokens_to_all_tokens_loss"] == "400"
    )  # 4 and 4.5: all they saw


def test_the_markdown_table_has_a_line_an_arm(out):
    lines = (out / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    minus = ["minus all tokens, a", "minus all tokens, b"]
    assert cells[0][:7] == ["arm", "a", "b", *minus, "seeds", "tokens seen"]
    assert cells[2][:6] == [
        "excess k = 0.5",
        "3.12 (3.00 to 3.25)",
        "6.25 (6.00 to 6.50)",
        "-1.12",
        "-2.25",
        "2",
    ]
    assert cells[3][3:5] == ["", ""]  # all tokens themselves
    assert len({len(row) for row in cells}) == 1
    assert REACH_NOTE in lines


def test_panels_hold_the_controls_and_the_baselines(tmp_path, sweep, monkeypatch):
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(report_module, "draw", lambda found, path: drawn.update({path.stem: found}))
    make_run(tmp_path / "ref", "All", None, final=2.0, corpus_fingerprint="0", tokens_seen=BUDGET)
    make_run(tmp_path / "sweep" / "soft", "Sigmoid", None, final=3.5)
    rows = report(
        **config(sweep, tmp_path / "out", baselines={"the reference": str(tmp_path / "ref")})
    ).rows
    assert rows[-1]["arm"] == "the reference" and rows[-1]["mean"] == 4.0
    assert rows[-1]["tokens_to_all_tokens_loss"] == 250  # 10 at 200, 4 at 400, 8.5 between
    panel, other = drawn["loss_vs_k"].panels
    assert ends_of(panel) == {
        "excess": ([0.5, 1.0], [3.0, 4.0], [3.25, 4.5]),
        "random": ([0.5, 1.0], [4.5, 4.0], [4.75, 4.5]),
        "sigmoid": ([0.5, 1.0], [3.5, 3.5], [3.5, 3.5]),
        "all tokens": ([0.5, 1.0], [4.25, 4.25], [4.25, 4.25]),
        "the reference": ([0.5, 1.0], [2.0, 2.0], [2.0, 2.0]),
    }
    assert ends_of(other)["all tokens"][1] == [8.5, 8.5]
    panels = drawn["loss_vs_tokens"].panels
    assert [panel.title for panel in panels[:3]] == ["excess, a", "random, a", "sigmoid, a"]
    last = [(one.text, one.is_seed, float(one.y[-1])) for one in panels[0].series]
    assert last == [
        *(("k = 0.5", True, 3.0), ("k = 0.5", True, 3.25), ("k = 0.5", False, 3.125)),
        *(("all tokens", True, loss) for loss in (4.0, 4.5, 4.0, 4.5)),
        ("all tokens", False, 4.25),
        ("before training", False, 9.0),
    ]
    assert [one.text for one in panels[2].series][0] == "sigmoid"


def ends_of(panel: Any) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Of each series: x, and its interval or itself."""
    return {
        one.text: (
            list(one.x),
            (one.y if one.low is None else one.low).tolist(),
            (one.y if one.high is None else one.high).tolist(),
        )
        for one in panel.series
    }


def test_sets_can_be_chosen(tmp_path, sweep):
    rows = report(**config(sweep, tmp_path / "out", sets=["b"])).rows
    assert {row["set"] for row in rows} == {"b"}
    with pytest.raises(UserError, match=r"sets names \['c'\], .* evaluated on \['a', 'b'\]"):
        report(**config(sweep, tmp_path / "out", sets=["c"]))


@pytest.mark.parametrize("most", [8, 0])
def test_sets_may_have_any_names(tmp_path, monkeypatch, most):
    """Two that differ by a slash have a picture each."""
    monkeypatch.setattr(report_module, "MAX_PANELS", most)
    for ratio in (0.5, 1.0):
        path = make_run(tmp_path / "runs" / f"{ratio}", ratio=ratio) / "heldout.csv"
        path.write_text(path.read_text().replace("/a/", "/x/y/").replace("/b/", "/x_y/"))
    rows = report(**config(tmp_path / "runs", tmp_path / "out")).rows
    assert [(row["set"], row["mean"]) for row in rows[:2]] == [("x/y", 3.0), ("x_y", 6.0)]
    shown = data_of(tmp_path / "out" / "report.html")["sweep"]["ratios"]
    assert [figure["title"] for figure in shown] == ["x/y", "x_y"]
    pictures = [path.name for path in (tmp_path / "out").glob("loss_vs_tokens*.png")]
    assert len(pictures) == (1 if most else 2)


def test_costs_are_shown_where_every_seed_has_them(tmp_path):
    make_run(tmp_path / "a", seed=0, train_seconds=10.0, train_flops=1e9)
    make_run(tmp_path / "b", seed=1, train_seconds=20.0, train_flops=None)
    make_run(tmp_path / "c", "All", None)
    rows = {row["arm"]: row for row in report(**config(tmp_path, tmp_path / "out")).rows}
    assert rows["excess k = 0.5"]["train_seconds"] == 15.0
    assert (
        rows["all tokens"]["train_seconds"] is None and "train_flops" not in rows["excess k = 0.5"]
    )


# ---- what is refused, what is left out ----------------------------------------------------------


def test_unfinished_runs_are_named_and_left_out(tmp_path, caplog):
    make_run(tmp_path / "runs" / "fine")
    (tmp_path / "runs" / "failed").mkdir()
    state = {"status": "failed", "error": "k is 2"}
    (tmp_path / "runs" / "failed" / "status.json").write_text(json.dumps(state))
    (make_run(tmp_path / "runs" / "killed", seed=1) / "model" / "slm.json").unlink()
    (make_run(tmp_path / "runs" / "silent", seed=2) / "heldout.csv").unlink()
    make_run(tmp_path / "runs" / "torn", seed=3, tokens_seen=BUDGET + 100)
    rows = report(**config(tmp_path / "runs", tmp_path / "out")).rows
    assert {row["seeds"] for row in rows} == {1}
    said = (tmp_path / "out" / "table.md").read_text()
    for name, reason in [
        ("failed", "failed: k is 2"),
        ("killed", "not complete"),
        ("silent", "has no heldout.csv"),
        ("torn", "heldout.csv ends at 400 tokens, the run at 500"),
    ]:
        assert f"{name}`: {reason}" in said
        assert any(f"/{name}: {reason}" in message for message in caplog.messages)
    assert any("no control" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"corpus_fingerprint": "tea"}, "the corpus of .*one is c0ffee, of .*two tea: runs of one"),
        ({"tokens_seen": 800}, "tokens_seen of .*one is 400, of .*two 800: runs of one report"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, record, message):
    make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", seed=1, **record)
    path = two / "heldout.csv"
    path.write_text(path.read_text().replace("400,", f"{record.get('tokens_seen', 400)},"))
    with pytest.raises(UserError, match=message):
        report(**config(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_heldout_sets_are_refused(tmp_path):
    make_run(tmp_path / "one")
    path = make_run(tmp_path / "two", seed=1) / "heldout.csv"
    path.write_text(path.read_text().replace("heldout/b/", "heldout/c/"))
    with pytest.raises(UserError, match=r"held-out sets of .* is \['a', 'b'\], .* \['a', 'c'\]"):
        report(**config(tmp_path, tmp_path / "out"))


def test_the_same_run_twice_is_no_second_seed(tmp_path):
    make_run(tmp_path / "one")
    make_run(tmp_path / "two")
    with pytest.raises(UserError, match="one and .*two are the same run with seed 0"):
        report(**config(tmp_path, tmp_path / "out"))


def test_folders_without_runs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no run"):
        report(**config(tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(UserError, match="nowhere is no folder"):
        report(**config(tmp_path / "nowhere", tmp_path / "out"))
    (make_run(tmp_path / "runs" / "a") / "model" / "slm.json").unlink()
    with pytest.raises(
        UserError, match="none of the 1 runs in .* can be shown, for the reasons above"
    ):
        report(**config(tmp_path / "runs", tmp_path / "out"))


def test_a_baseline_is_one_arm_on_the_same_sets(tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "two" / "a", ratio=0.5)
    make_run(tmp_path / "two" / "b", ratio=0.25)
    with pytest.raises(
        UserError, match=r"'x' must be one finished arm, .* \['excess k = 0.25', 'ex"
    ):
        report(
            **config(tmp_path / "runs", tmp_path / "out", baselines={"x": str(tmp_path / "two")})
        )
    path = make_run(tmp_path / "other") / "heldout.csv"
    path.write_text(path.read_text().replace("heldout/b/", "heldout/c/"))
    expected = r"'x' .* not evaluated on \['b'\], only on \['a', 'c'\]: name .* sets=\[a\]"
    with pytest.raises(UserError, match=expected):
        report(
            **config(tmp_path / "runs", tmp_path / "out", baselines={"x": str(tmp_path / "other")})
        )


def heldout(fingerprint: str, windows: int = 8) -> dict[str, Any]:
    return {"b": {"fingerprint": fingerprint, "windows": windows}}


@pytest.mark.parametrize("other", [heldout("tea"), heldout("cafe", 9)])
def test_losses_on_other_windows_are_refused(tmp_path, other):
    make_run(tmp_path / "runs" / "old")
    make_run(tmp_path / "runs" / "one", seed=1, heldout=heldout("cafe"))
    two = make_run(tmp_path / "two", seed=2, heldout=other)
    entry = other["b"]
    expected = (
        r"set 'b' of .*one is 8 windows \(fingerprint cafe\), of .*two "
        rf"{entry['windows']} windows \(fingerprint {entry['fingerprint']}\)"
    )
    runs, out = tmp_path / "runs", tmp_path / "out"
    with pytest.raises(UserError, match=expected):
        report(**config([runs, two], out))
    words = rf"'x' was evaluated on {entry['windows']} windows .* of 'b', .*one on 8 windows"
    with pytest.raises(UserError, match=words + ".* heldout={b: FOLDER}"):
        report(**config(runs, out, baselines={"x": str(two)}, sets=["b"]))
    assert not out.exists()
    assert [row["seeds"] for row in report(**config([runs, two], out, sets=["a"])).rows] == [3]


@pytest.mark.parametrize("name", ["all tokens", "excess k = 0.5"])
def test_a_baseline_has_a_name_of_its_own(tmp_path, sweep, name):
    make_run(tmp_path / "ref", "All", None, final=2.0)
    with pytest.raises(UserError, match=f"baseline '{name}' .* has the name of an arm"):
        report(**config(sweep, tmp_path / "out", baselines={name: str(tmp_path / "ref")}))
    assert not (tmp_path / "out").exists()


def test_a_baseline_without_any_of_the_sets_cannot_be_drawn(tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "other")
    path = tmp_path / "other" / "heldout.csv"
    path.write_text(path.read_text().replace("/b/", "/c/"))
    settings = config(
        tmp_path / "runs", tmp_path / "out", sets=["b"], baselines={"x": str(tmp_path / "other")}
    )
    with pytest.raises(UserError, match="no set is left that all have, leave the baseline out"):
        report(**settings)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [(4, ["loss_vs_tokens"]), (5, ["loss_vs_tokens_a", "loss_vs_tokens_b"])],
)
def test_many_panels_become_a_picture_a_set(tmp_path, monkeypatch, rules, expected):
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(report_module, "draw", lambda found, path: drawn.update({path.stem: found}))
    for i in range(rules):
        make_run(tmp_path / "runs" / f"{i}", f"Rule{i}")
    report(**config(tmp_path / "runs", tmp_path / "out"))
    assert list(drawn) == ["loss_vs_k", *expected]
    panels = [len(drawn[name].panels) for name in expected]
    assert panels == [2 * rules // len(expected)] * len(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("runs", {"a": "b"}, "runs is "),
        ("baselines", "folder", "baselines is 'folder', it"),
    ],
)
def test_settings_of_the_wrong_shape_are_refused(tmp_path, key, value, message):
    make_run(tmp_path / "a")
    settings = config(tmp_path, tmp_path / "out")
    settings[key] = value
    with pytest.raises(UserError, match=message):
        report(**settings)


def test_without_an_arm_that_selects_nothing_is_drawn_against_k(tmp_path):
    report(**config(make_run(tmp_path / "run", "All", None), tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "loss_vs_tokens.png" in names and "loss_vs_k.png" not in names
    assert list(data_of(tmp_path / "out" / "report.html")["sweep"]) == ["tokens"]


# ---- token dynamics -----------------------------------------------------------------------------


def data_of(page: Path) -> Any:
    text = page.read_text().split('<script type="application/json" id="data">')[1]
    return json.loads(text.split("</script>")[0])


def test_runs_with_token_losses_are_shown_beside_the_sweep(out):
    data = data_of(out / "report.html")
    assert [run["name"] for run in data["runs"]] == ["Excess0half"]
    assert data["runs"][0]["mean_loss"] == 2.5  # what the classes were made with
    assert len(data["sweep"]["ratios"]) == 2
    with open(out / "figures" / "selection-Excess0half.csv", newline="") as file:
        panels = {row["panel"] for row in csv.DictReader(file)}
    assert len(panels) == 3  # selected, held out, unselected
    for path in (out / "loss_vs_k.png", out / "figures" / "selection-Excess0half.png"):
        assert_files(path)
    assert not (out / "truth.csv").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("all", "excess"):
        make_analysis(tmp_path / "runs" / name / "first" / "dynamics" / "tokens", prose(4, 9))
        make_run(tmp_path / "runs" / name / "first", identity={"x": name})
    make_analysis(tmp_path / "runs" / "all" / "first" / "dynamics" / "other", prose(4, 9))
    expected = ["all/first, other", "all/first, tokens", "excess/first"]
    assert names_shown(tmp_path / "runs") == expected


def test_a_run_that_still_trains_shows_what_it_has(tmp_path, caplog):
    make_analysis(tmp_path / "run" / "dynamics" / "tokens", prose(4, 9))
    (tmp_path / "run" / "run.json").write_text("{}")
    assert report(**config(tmp_path / "run", tmp_path / "out")).rows == []
    assert [run["name"] for run in data_of(tmp_path / "out" / "report.html")["runs"]] == ["run"]
    assert "run: not complete" in caplog.text
    assert not (tmp_path / "out" / "table.csv").exists()


def test_too_short_trajectories_are_named(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    analysis = make_analysis(folder / "dynamics" / "tokens", prose(4, 9))
    analysis.store.forget_after(1000)
    report(**config(folder, tmp_path / "out"))
    assert "tokens has 2 checkpoints, a trajectory needs 3" in caplog.text
    assert data_of(tmp_path / "out" / "report.html")["runs"] == []


def test_a_damaged_store_is_named_and_left_out(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    analysis = make_analysis(folder / "dynamics" / "tokens", prose(4, 9))
    path = analysis.store.path(2000)
    column = np.load(path)
    column[5] = np.nan
    np.save(path, column)
    assert report(**config(folder, tmp_path / "out")).rows
    message = "losses-000000000002000.npy: loss nan at token 5, finite numbers are needed"
    assert "left out: the token losses of run: " in caplog.text and message in caplog.text
    column[5] = 1.25
    np.save(path, column)  # a number again, but another one than was written
    caplog.clear()
    assert names_shown(folder) == ["run"]
    report(**config(folder, tmp_path / "out", check="full"))
    assert "losses-000000000002000.npy is damaged: sha256" in caplog.text
    assert data_of(tmp_path / "out" / "report.html")["runs"] == []
    path.write_bytes(path.read_bytes()[:-3])
    caplog.clear()
    assert names_shown(folder) == []
    assert "losses-000000000002000.npy" in caplog.text and "left out" in caplog.text


def test_jobs_of_a_sweep_are_named_after_their_arms(tmp_path):
    """Where the arms differ in more than the rule, so do their names."""
    for rate, ratio, seed in ((1, 0.4, 0), (1, 0.4, 1), (2, 0.4, 0), (1, 1.0, 0)):
        folder = tmp_path / "sweep" / f"selection=excess,lr={rate},k={ratio},seed={seed}"
        make_run(folder, "Excess", ratio, seed, identity={"optimizer.adamw.lr": rate})
        make_analysis(folder / "dynamics" / "tokens", prose(4, 9))
    assert set(names_shown(tmp_path / "sweep")) == {
        "excess k = 0.4, lr=1, seed 0",
        "excess k = 0.4, lr=1, seed 1",
        "excess k = 0.4, lr=2, seed 0",
        "excess k = 1, lr=1, seed 0",
    }


def names_shown(runs: Path) -> list[str]:
    return [analysis.name for analysis in read_analyses(all_stores([str(runs)]), "size")]


def test_figures_of_an_earlier_report_go(tmp_path):
    for name in ("one", "two"):
        folder = make_run(tmp_path / name)
        make_analysis(folder / "dynamics" / "tokens", prose(4, 9))
        report(**config(folder, tmp_path / "out"))
        (tmp_path / "out" / "figures" / "mine.png").touch()
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert "classes-two.svg" in names and "classes-one.svg" not in names and "mine.png" in names


def test_files_of_others_are_neither_replaced_nor_removed(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    mine = ["table.csv", "truth.csv", "truth_kept.csv", "loss_vs_mine.png", "figures/classes-x.csv"]
    (tmp_path / "figures").mkdir()
    for name in mine:
        (tmp_path / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^table.csv would be replaced, .* another folder than \."):
        report(**config(folder, Path()))
    (tmp_path / "table.csv").rename(tmp_path / "my_table.csv")
    report(**config(folder, Path()))
    report(**config(folder, Path()))
    assert {(tmp_path / name).read_text() for name in ["my_table.csv", *mine[1:]]} == {"mine"}


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    report(**config(folder, tmp_path / "out"))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report_module, "write_page", full)
    with pytest.raises(UserError, match="/out/.* cannot be written: No space left on device; "):
        report(**config(folder, tmp_path / "out"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_at_most_so_many_runs_are_shown(tmp_path, caplog):
    for seed in range(3):
        folder = make_run(tmp_path / "runs" / f"r{seed}", seed=seed)
        make_analysis(folder / "dynamics" / "tokens", prose(4, 9))
    report(**config(tmp_path / "runs", tmp_path / "out", max_dynamics=2))
    text = (
        "3 runs in 1 arm have token losses; 2 of them, in 1 arm, are shown (max_dynamics), one "
        "seed of each arm before a second: r0; r1"
    )
    assert text in caplog.text and text in (tmp_path / "out" / "report.html").read_text()
    data = data_of(tmp_path / "out" / "report.html")
    assert [run["name"] for run in data["runs"]] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (9, ["a0", "a1", "b0", "c0", "c1", "d0"]),
        (5, ["a0", "a1", "b0", "c0", "d0"]),
        (4, ["a0", "b0", "c0", "d0"]),
        (3, ["a0", "c0", "d0"]),
        (0, []),
    ],
)
def test_every_arm_is_shown_before_a_second_seed_of_any(most, expected):
    names = ["a0", "a1", "b0", "c0", "c1", "d0"]
    stores = [Store(Path(name), name, name[0]) for name in names]
    assert [store.name for store in chosen_stores(stores, most)] == expected


def test_labelled_tokens_give_a_table(tmp_path):
    folder = make_run(tmp_path / "run")
    plain = make_analysis(tmp_path / "plain", prose(4, 9))
    label = (np.arange(plain.tokens.num_targets) % 3 > 0).astype(np.int8)
    tokens = replace(plain.tokens, columns={**plain.tokens.columns, "signal": label})
    store = TrajectoryStore.create(folder / "dynamics" / "tokens", plain.store.plan, tokens)
    for seen, column in zip(plain.tokens_seen, plain.losses, strict=True):
        store.append(int(seen), column)
    report(**config(folder, tmp_path / "out"))
    with open(tmp_path / "out" / "truth.csv", newline="") as file:
        found = list(csv.DictReader(file))
    expected = truth_rows(analyse(store, "run"))
    assert [float(row["auc"]) for row in found] == [row["auc"] for row in expected]
    assert (tmp_path / "out" / "truth_kept.csv").exists()
    assert "truth" in data_of(tmp_path / "out" / "report.html")["runs"][0]["figures"]


def test_a_baseline_that_is_not_complete_is_told_so(tmp_path, sweep):
    (make_run(tmp_path / "reference") / "model" / "slm.json").unlink()
    lines = {"reference model": str(tmp_path / "reference")}
    message = r"must be one finished arm, .*reference has none \(not complete"
    with pytest.raises(UserError, match=message):
        report(**config(sweep, tmp_path / "out", baselines=lines))
