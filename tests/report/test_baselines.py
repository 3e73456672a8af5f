"""What stands beside the arms: the model before training, runs, and models without a run."""

from pathlib import Path
from typing import Any

import pytest

from model_helpers import small_llama
from run_helpers import compose_report as config
from run_helpers import make_run
from slm.errors import UserError
from slm.evaluate.command import evaluate, window_losses
from slm.model.build import SelectiveLM, load_model
from slm.model.folder import model_sha256, save_model
from slm.report.arms import read_runs
from slm.report.baselines import BEFORE, before_training
from slm.report.command import report
from slm.store.shards import Corpus
from slm.train.curves import write_window_losses

pytestmark = pytest.mark.usefixtures("sketched")


@pytest.fixture
def model(tmp_path, tokenizer) -> Path:
    save_model(tmp_path / "model", small_llama(vocab_size=300), tokenizer, "", {})
    return tmp_path / "model"


def heldout(corpus: Corpus, windows: int = 5) -> dict[str, Any]:
    return {"a": {"fingerprint": corpus.fingerprint, "windows": windows}}


def test_a_model_without_a_run_is_evaluated_on_the_runs_windows(tmp_path, model, text_corpus):
    found = window_losses(SelectiveLM(load_model(model)), text_corpus, 2, 5)
    run = make_run(tmp_path / "runs" / "all", "All", None, heldout=heldout(text_corpus))
    write_window_losses(run, 400, {"a": found})
    made = report(
        **config(
            tmp_path / "runs",
            tmp_path / "out",
            sets=["a"],
            baselines={"base": str(model)},
            heldout={"a": str(text_corpus.folder)},
        )
    )
    (expected,) = evaluate({"x": model}, {"a": text_corpus.folder}, max_windows=5)
    row = made.rows[-1]
    assert (row["arm"], row["windows"], row["tokens_seen"]) == ("base", 5, 0)
    assert row["mean"] == pytest.approx(expected["loss"], abs=1e-6)
    # the run's windows are the model's own here: all of the difference is in the losses' means
    assert row["minus_all_tokens"] == pytest.approx(expected["loss"] - 3.0, abs=1e-6)
    assert row["minus_all_tokens_half_width"] == pytest.approx(0, abs=1e-6)
    page = made.page.read_text(encoding="utf-8")
    assert "base: the model" in page and "5 windows" in page
    assert "the runs began with" not in page


def test_a_baseline_that_the_runs_began_with_is_said_to_be_that(tmp_path, model, text_corpus):
    identity = {"init_from": model_sha256(model)}
    run = tmp_path / "runs" / "all"
    make_run(run, "All", None, identity=identity, heldout=heldout(text_corpus))
    named = {"baselines": {"base": str(model)}, "heldout": {"a": str(text_corpus.folder)}}
    made = report(**config(tmp_path / "runs", tmp_path / "out", sets=["a"], **named))
    page = made.page.read_text(encoding="utf-8")
    assert "/model, evaluated by this report, which the runs began with" in page


def move_weights(model: Path, run: Path) -> None:
    """Into a run whose model/ has its record alone."""
    for path in model.iterdir():
        if path.name != "slm.json":
            path.rename(run / "model" / path.name)


def test_a_run_that_read_other_windows_is_evaluated_on_the_runs(tmp_path, model, text_corpus):
    """A reference whose budget allowed fewer of them."""
    corpora = {"a": str(text_corpus.folder)}
    make_run(tmp_path / "runs" / "all", "All", None, heldout=heldout(text_corpus))
    run = make_run(tmp_path / "ref", "All", None, final=2.0, heldout=heldout(text_corpus, 3))
    move_weights(model, run)
    more = {"sets": ["a"], "baselines": {"ref": str(run)}}
    row = report(**config(tmp_path / "runs", tmp_path / "out", **more, heldout=corpora)).rows[-1]
    (expected,) = evaluate({"x": run / "model"}, corpora, max_windows=5)
    assert (row["arm"], row["windows"], row["tokens_seen"]) == ("ref", 5, 400)
    assert row["mean"] == pytest.approx(expected["loss"], abs=1e-6)
    with pytest.raises(UserError, match=r"'ref' was evaluated on 3 windows .* on 5 windows"):
        report(**config(tmp_path / "runs", tmp_path / "other", **more))


def test_a_run_that_evaluated_nothing_is_evaluated_as_its_model(tmp_path, model, text_corpus):
    """A reference that was trained without data.heldout."""
    corpora = {"a": str(text_corpus.folder)}
    make_run(tmp_path / "runs" / "all", "All", None, heldout=heldout(text_corpus))
    run = make_run(tmp_path / "ref", "All", None)
    (run / "heldout.csv").unlink()
    move_weights(model, run)
    more = {"sets": ["a"], "baselines": {"ref": str(run)}}
    row = report(**config(tmp_path / "runs", tmp_path / "out", **more, heldout=corpora)).rows[-1]
    (expected,) = evaluate({"x": run / "model"}, corpora, max_windows=5)
    assert (row["arm"], row["windows"], row["tokens_seen"]) == ("ref", 5, 400)
    assert row["mean"] == pytest.approx(expected["loss"], abs=1e-6)
    with pytest.raises(UserError, match="'ref' has no held-out losses of its own: name the corpus"):
        report(**config(tmp_path / "runs", tmp_path / "other", **more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": None}, "has no held-out losses of its own: .* heldout={a: FOLDER}"),
        ({"baselines": {"base": "nowhere/else"}}, "baseline 'base'"),
        ({"windows": {"a": {"fingerprint": "c0ffee", "windows": 5}}}, "has the fingerprint"),
        ({"windows": {}}, "does not say which windows of 'a'"),
    ],
)
def test_models_that_cannot_be_evaluated_alike(tmp_path, model, text_corpus, changes, message):
    windows = changes.pop("windows", heldout(text_corpus))
    make_run(tmp_path / "runs" / "all", "All", None, heldout=windows)
    more = {"baselines": {"base": str(model)}, "heldout": {"a": str(text_corpus.folder)}}
    with pytest.raises(UserError, match=message):
        report(**config(tmp_path / "runs", tmp_path / "out", sets=["a"], **(more | changes)))
    assert not (tmp_path / "out" / "report.html").exists()


def test_the_model_that_all_began_with_stands_beside_them(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"{seed}", seed=seed, identity={"init_from": "f00d"})
    runs = read_runs([str(tmp_path)])[0]
    (arm,) = before_training(runs, ["a", "b"])
    assert (arm.label, arm.losses("a"), arm.losses("b")) == (BEFORE, [9.0], [18.0])
    rows = report(**config(tmp_path, tmp_path / "out")).rows
    assert [(row["arm"], row["mean"]) for row in rows[:2]] == [(BEFORE, 9.0), (BEFORE, 18.0)]


@pytest.mark.parametrize("starts", [(None, None), ("f00d", "beef")])
def test_without_one_beginning_there_is_none_beside_them(tmp_path, starts):
    for seed, start in enumerate(starts):
        make_run(tmp_path / f"{seed}", ratio=0.5 + seed / 4, identity={"init_from": start})
    assert before_training(read_runs([str(tmp_path)])[0], ["a"]) == []


def test_a_run_that_was_not_measured_before_training_has_none(tmp_path):
    run = make_run(tmp_path / "x", identity={"init_from": "f00d"})
    lines = (run / "heldout.csv").read_text().splitlines()
    (run / "heldout.csv").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    assert before_training(read_runs([str(tmp_path)])[0], ["a"]) == []
