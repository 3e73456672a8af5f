"""What 0.1.0 at commit 84709bf left on disk (fixtures/) opens, resumes and compares with ours."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from run_helpers import TINY_MODEL, composed, train
from slm.cli import plain_settings
from slm.dynamics import command as dynamics_module
from slm.dynamics.command import dynamics
from slm.dynamics.trajectories import TrajectoryStore
from slm.errors import UserError
from slm.evaluate.command import evaluate
from slm.report.arms import arms_of, read_runs
from slm.report.command import report
from slm.store.files import read_json, write_record
from slm.store.shards import Corpus, References
from slm.store.windows import Windows
from slm.train.sweep import sweep_rows
from slm.verify import verify

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0_1_0"


@pytest.fixture
def disk(tmp_path) -> Path:
    return shutil.copytree(WRITTEN, tmp_path / "disk")


def train_words(disk: Path, out: Path, *more: str) -> list[str]:
    """As make.sh has them."""
    return [
        f"out='{out}'",
        f"run_dir='{out}'",
        f"data.corpus='{disk}/corpus/train'",
        f"data.references='{disk}/references'",
        f"data.heldout={{held: '{disk}/corpus/heldout'}}",
        *TINY_MODEL,
        "model.architecture.intermediate_size=16",
        "model.architecture.max_position_embeddings=32",
        "data.batch_size=8",
        "data.micro_batch_size=4",
        "callbacks.metrics.every_steps=1",
        "callbacks.heldout.every_tokens=512",
        "callbacks.checkpoints.every_tokens=512",
        "logger=csv",
        "max_tokens=2048",
        *more,
    ]


HALF = ("selection=excess", "selection.select_ratio=0.5")


def losses(path: Path) -> list[dict[str, float]]:
    """A log without what measures time or memory."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v and "perf/" not in k} for row in rows]


def same_losses(one: Path, other: Path) -> None:
    for log in ("train.csv", "heldout.csv"):
        found, expected = losses(one / log), losses(other / log)
        assert len(found) == len(expected) > 1
        for mine, its in zip(found, expected, strict=True):
            assert mine == pytest.approx(its, rel=1e-4, abs=1e-4)  # another CPU rounds otherwise


def test_every_folder_verifies(disk):
    found = {str(path.relative_to(disk)): (whole, text) for path, whole, text in verify(disk)}
    assert len(found) > 20
    assert [name for name, (whole, _) in found.items() if not whole] == ["interrupted"], found
    assert "is unfinished" in found["interrupted"][1]


def test_a_corpus_and_its_scores_are_windows(disk):
    windows = Windows(Corpus.open(disk / "corpus/train"), [References.open(disk / "references")])
    batch = windows.batch(np.arange(len(windows)))
    assert batch["input_ids"].shape[1] == 16
    assert (batch["reference_logprob"] <= 0).all() and (batch["reference_entropy"] >= 0).all()
    answers = Windows(Corpus.open(disk / "answers/train"))
    assert (answers.batch(np.arange(len(answers)))["targets"] == -100).any()


@pytest.mark.parametrize(
    ("run", "more"),
    [
        ("finished", HALF),
        ("sweep/selection=excess", ("selection=excess",)),
        ("sweep/selection=random", ("selection=random",)),
    ],
)
def test_a_finished_run_is_finished(disk, caplog, run, more):
    caplog.set_level("INFO")
    model = disk / run / "model" / "model.safetensors"
    before = model.read_bytes(), model.stat().st_mtime_ns
    train(composed("train", *train_words(disk, disk / run, *more)))
    assert (model.read_bytes(), model.stat().st_mtime_ns) == before
    assert "is complete already" in caplog.text


def test_an_interrupted_run_goes_on_and_ends_as_its_finished_twin(disk, caplog):
    caplog.set_level("INFO")
    run = disk / "interrupted"
    done = losses(run / "train.csv")
    train(composed("train", *train_words(disk, run, *HALF)))
    assert "continuing" in caplog.text and 0 < len(done) < len(losses(run / "train.csv"))
    same_losses(run, disk / "finished")


def test_a_run_keeps_its_order(disk):
    words = train_words(disk, disk / "interrupted", *HALF)
    expected = "data.order is 'permutation' in run.json, 'keyed' now; choose another `out`"
    with pytest.raises(UserError, match=f"holds another run: {expected}$"):
        train(composed("train", *words, "data.order=keyed"))
    record = read_json(disk / "interrupted" / "run.json") | {"data.order": "sorted"}
    write_record(disk / "interrupted" / "run.json", record)
    with pytest.raises(UserError, match=r"run\.json: data.order is .sorted., known are keyed"):
        train(composed("train", *words))


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Path:
    """With a run of ours, of another seed than the finished one."""
    disk = shutil.copytree(WRITTEN, tmp_path_factory.mktemp("beside") / "disk")
    train(composed("train", *train_words(disk, disk / "new", *HALF, "seed=1")))
    return disk


def test_a_new_run_is_of_the_same_arm(beside):
    runs, left_out = read_runs([str(beside / "finished"), str(beside / "new")])
    (arm,) = arms_of(runs)
    assert (arm.label, len(arm.runs), left_out) == ("excess k = 0.5", 2, {})


@pytest.mark.usefixtures("sketched")
def test_a_report_has_a_new_run_beside_the_older_one(beside, tmp_path):
    paths = ", ".join(f"'{beside}/{name}'" for name in ("finished", "new"))
    settings = composed("report", f"runs=[{paths}]", f"out='{tmp_path}/report'")
    report(**plain_settings(settings))
    with open(tmp_path / "report" / "table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["arm"], row["seeds"]) == ("excess k = 0.5", "2")
    assert (tmp_path / "report" / "figures").is_dir()


def test_a_sweep_is_two_arms(disk):
    runs, left_out = read_runs([str(disk / "sweep")])
    assert [arm.label for arm in arms_of(runs)] == [
        "excess k = 0.6",
        "random k = 0.6",
    ] and not left_out
    folder = disk / "sweep"
    number = json.loads((folder / "selection=random" / "status.json").read_text())["sweep"]
    rows = sweep_rows(folder, number)
    assert [(row.job, row.status) for row in rows] == [
        ("selection=excess", "finished"),
        ("selection=random", "finished"),
    ]
    assert all(row.losses["held"] > 1 for row in rows)


def dynamics_of(disk: Path) -> Any:
    return composed(
        "dynamics",
        f"runs='{disk}/finished'",
        f"corpus='{disk}/corpus/heldout'",
        f"references='{disk}/heldout_references'",
        "num_targets=320",
    )


def test_token_losses_are_used_and_what_is_missing_is_added(disk, monkeypatch):
    store = TrajectoryStore(disk / "finished" / "dynamics" / "checkpoints", "full")
    assert TrajectoryStore(disk / "finished" / "dynamics" / "tokens", "full").checkpoints
    before = [np.array(column) for column in store.losses()]
    classes = (store.folder / "classes.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(dynamics_module, "load_if_there", None)  # no checkpoint is read
        (analysis,) = dynamics(**plain_settings(dynamics_of(disk))).analyses
    assert (store.folder / "classes.csv").read_bytes() == classes
    assert analysis.chooser is not None and analysis.chooser.name == "excess k = 0.5"
    last = store.checkpoints[-1].tokens_seen
    store.path(last, ".json").unlink()
    dynamics(**plain_settings(dynamics_of(disk)))
    for found, expected in zip(store.losses(), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_model_is_evaluated(disk):
    (row,) = evaluate({"m": disk / "finished/model"}, {"held": disk / "corpus/heldout"})
    last = losses(disk / "finished" / "heldout.csv")[-1]
    assert row["loss"] == pytest.approx(last["heldout/held/loss"], rel=1e-5)
