"""Which runs are one arm, what it is called, which is the control, what a run cost."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from run_helpers import make_run
from slm.report.arms import arms_of, costs, read_runs


def labels(folder: Path) -> list[str]:
    return [arm.label for arm in arms_of(read_runs([str(folder)])[0])]


def test_arms_that_differ_in_their_backward_say_so(tmp_path):
    make_run(tmp_path / "a")  # the exact one is not written
    make_run(tmp_path / "b", identity={"model.backward": "selected"})
    labels = [arm.label for arm in arms_of(read_runs([str(tmp_path)])[0])]
    assert labels == ["excess k = 0.5, backward=exact", "excess k = 0.5, backward=selected"]


def test_an_arm_is_what_differs_in_the_seed_alone(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"random{seed}", "Random", 0.5, seed)
        make_run(tmp_path / f"all{seed}", "All", None, seed)
        make_run(tmp_path / f"loss{seed}", "ReferenceLoss", 0.25, seed)
    assert labels(tmp_path) == ["all tokens", "random k = 0.5", "reference_loss k = 0.25"]
    assert [len(arm.runs) for arm in arms_of(read_runs([str(tmp_path)])[0])] == [2, 2, 2]


def test_arms_of_one_name_are_told_apart_by_what_differs(tmp_path):
    make_run(tmp_path / "a", identity={"optimizer.adamw.lr": 0.1, "references": "f" * 64})
    make_run(tmp_path / "b", identity={"optimizer.adamw.lr": 0.2, "references": "f" * 64})
    more = {"optimizer.adamw.lr": 0.2, "references": "f" * 64}
    make_run(tmp_path / "c", ratio=0.25, identity=more)  # on the line of the second
    assert labels(tmp_path) == [
        "excess k = 0.5, lr=0.1",
        "excess k = 0.25, lr=0.2",
        "excess k = 0.5, lr=0.2",
    ]
    lines = [arm.line for arm in arms_of(read_runs([str(tmp_path)])[0])]
    assert lines == ["excess, lr=0.1", "excess, lr=0.2", "excess, lr=0.2"]
    make_run(tmp_path / "d", identity={"optimizer.adamw.lr": 0.2, "references": "e" * 64})
    assert "excess k = 0.5, lr=0.2, references=eeeeeeee" in labels(tmp_path)


@pytest.mark.parametrize(
    ("selection", "ratio", "expected"),
    [("All", None, True), ("Excess", 1.0, True), ("Excess", 0.9, False), ("Sigmoid", None, False)],
)
def test_which_arm_is_the_control(tmp_path, selection, ratio, expected):
    make_run(tmp_path / "a", selection, ratio)
    (run,), _ = read_runs([str(tmp_path)])
    assert run.takes_all_tokens is expected


def test_a_weighting_rule_at_ratio_1_is_no_control(tmp_path):
    rule = {"_target_": "slm.selection.Soft", "select_ratio": 1.0, "temperature": 2.0}
    make_run(tmp_path / "a")
    record = json.loads((tmp_path / "a" / "model" / "slm.json").read_text())
    record["lineage"]["selection"] = rule
    (tmp_path / "a" / "model" / "slm.json").write_text(json.dumps(record))
    (run,), _ = read_runs([str(tmp_path)])
    assert not run.takes_all_tokens


def test_a_schedule_has_no_place_on_the_axis_of_ratios(tmp_path):
    record_ratio(tmp_path / "a", {"shape": "linear", "points": [[0, 1.0], [100, 0.6]]})
    (run,), _ = read_runs([str(tmp_path)])
    assert run.select_ratio is None and not run.takes_all_tokens
    assert labels(tmp_path) == ["excess k = 1 → 0.6 (linear)"]


def test_schedules_of_one_course_are_told_apart_by_their_points(tmp_path):
    for name, end in (("a", 100), ("b", 200)):
        points = [[0, 1.0], [end, 0.6]]
        flat = {"selection.select_ratio.points": points}
        record_ratio(tmp_path / name, {"shape": "step", "points": points}, flat)
    assert labels(tmp_path) == [
        "excess k = 1 → 0.6 (step), points=1 at 0 → 0.6 at 100",
        "excess k = 1 → 0.6 (step), points=1 at 0 → 0.6 at 200",
    ]


def test_what_is_empty_is_named_only_where_nothing_else_is(tmp_path):
    one, two = "a" * 64, "b" * 64
    for name, references, combine, online in [
        ("plain", [], None, None),
        ("online", [], None, two),
        ("one", [one], None, None),
        ("two", [one, two], "mean", None),
    ]:
        fields = {"references": references, "data.combine": combine, "online_reference": online}
        make_run(tmp_path / name, identity=fields)
    assert labels(tmp_path) == [
        "excess k = 0.5, combine=mean, references=aaaaaaaa+bbbbbbbb",
        "excess k = 0.5, no combine, no online_reference, no references",
        "excess k = 0.5, online_reference=bbbbbbbb",
        "excess k = 0.5, references=aaaaaaaa",
    ]


def test_fields_of_one_ending_have_their_whole_names(tmp_path):
    make_run(tmp_path / "a", identity={"x.rate": 1, "y.rate": 2, "name": "slm.optim.warmup_cosine"})
    make_run(tmp_path / "b", identity={"x.rate": 2, "y.rate": 1, "name": "slm.optim.warmup_linear"})
    assert labels(tmp_path) == [
        "excess k = 0.5, name=slm.optim.warmup_cosine, x.rate=1, y.rate=2",
        "excess k = 0.5, name=slm.optim.warmup_linear, x.rate=2, y.rate=1",
    ]


def record_ratio(folder: Path, ratio: Any, identity: dict[str, Any] | None = None) -> None:
    path = make_run(folder, identity=identity) / "model" / "slm.json"
    record = json.loads(path.read_text())
    record["lineage"]["selection"]["select_ratio"] = ratio
    path.write_text(json.dumps(record))


def reference(seconds: float, training: dict[str, Any] | None) -> dict[str, Any]:
    cost = {"seconds": seconds, "flops": 10 * seconds, "devices": ["cpu"]}
    return {"scoring_cost": cost, "model_lineage": training}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, {}),
        ({"train_seconds": 2.0, "train_flops": None, "references": []}, {"train_seconds": 2.0}),
        (
            {
                "references": [
                    reference(3, {"train_seconds": 7.0, "train_flops": 8.0}),
                    reference(4, None),
                ]
            },
            {"score_seconds": 7, "score_flops": 70},
        ),
        (
            {"references": [reference(3, {"train_seconds": 7.0, "train_flops": 8.0})]},
            {
                "score_seconds": 3,
                "score_flops": 30,
                "reference_train_seconds": 7.0,
                "reference_train_flops": 8.0,
            },
        ),
        ({"references": [{"scoring_cost": None, "model_lineage": None}]}, {}),
    ],
)
def test_costs_are_what_was_measured(tmp_path, record, expected):
    make_run(tmp_path / "a", **record)
    (run,), _ = read_runs([str(tmp_path)])
    assert costs(run) == expected


@pytest.mark.parametrize("charged", [True, False])
def test_references_that_are_only_logged_cost_nothing(tmp_path, charged):
    stores = [reference(3, {"train_seconds": 7.0, "train_flops": None})]
    make_run(tmp_path / "a", references=stores, train_seconds=2.0, needs_references=charged)
    (run,), _ = read_runs([str(tmp_path)])
    scores = {"score_seconds": 3, "score_flops": 30, "reference_train_seconds": 7.0}
    assert costs(run) == {"train_seconds": 2.0} | (scores if charged else {})


def test_one_run_over_runs_below_it_is_read_once(tmp_path):
    make_run(tmp_path / "a" / "b")
    runs, _ = read_runs([str(tmp_path), str(tmp_path / "a" / "b")])
    assert [run.folder.name for run in runs] == ["b"]
    assert math.isclose(float(runs[0].curves["a"].loss[-1]), 3.0)
