"""How often a run is evaluated against its budget, counted by hand; what is said at its start."""

import json
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from run_helpers import train
from slm.model.flops import flops_per_token, forward_flops_per_token
from slm.train.callbacks.base import is_due, num_due
from slm.train.callbacks.costs import Plan, plan
from train_helpers import Crash, compose_train, rows, same_results

BY_DEFAULT = "callbacks.heldout.every_tokens=null"


@pytest.mark.parametrize("every", [None, 1, 40, 41, 100, 350, 10_000])
@pytest.mark.parametrize(("steps", "parts"), [(1, 20), (7, 3), (13, 20), (100, 20), (103, 32)])
def test_steps_that_are_due_are_counted_without_looking_at_each(every, steps, parts):
    data = SimpleNamespace(tokens_per_step=40)
    trainer: Any = SimpleNamespace(max_steps=steps, datamodule=data, global_step=0)
    due = 0
    for trainer.global_step in range(1, steps + 1):
        due += is_due(trainer, every, parts)
    assert num_due(trainer, every, parts) == due


@pytest.mark.parametrize(
    ("budget", "fewer", "wanted"),
    [
        (2100, True, Plan(20, 10)),  # 21 times 100
        (2099, True, Plan(19, 10)),
        (250, True, Plan(1, 10)),
        (199, True, Plan(1, 9)),  # twice 90
        (199, False, Plan(1, 10)),  # a run that goes on measures what it has measured
        (45, True, Plan(1, 2)),
        (3, True, Plan(1, 1)),
    ],
)
def test_a_plan_takes_as_often_as_the_budget_allows_then_fewer_windows(budget, fewer, wanted):
    made = plan(budget, lambda parts: parts + 1, lambda windows: 10.0 * windows, 10, fewer)
    assert made == wanted


def spent(folder, seq_len: int) -> tuple[int, float]:
    """Evaluations in heldout.csv, and their share of the FLOPs as if no token were selected."""
    lineage = json.loads((folder / "lineage.json").read_text())
    times, windows = len(rows(folder / "heldout.csv")), lineage["heldout"]["held"]["windows"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    forward, least = forward_flops_per_token(model, seq_len), flops_per_token(model, seq_len, 0.0)
    assert forward is not None and least is not None
    # 16 windows for the overlap of masks, or as few as are held out
    read = times * seq_len * (windows + min(16, windows)) * forward
    return windows, read / (read + lineage["tokens_seen"] * least)


def test_the_default_stays_within_its_share_and_is_the_same_for_every_rule(
    tmp_path, text_corpus, caplog
):
    """12 steps of 8 windows of 16 tokens, 40 windows in the held-out set."""
    caplog.set_level(logging.INFO, "slm.train")
    words = (BY_DEFAULT, "data.heldout_windows=30")
    logs = []
    for name, backward in (("all", "exact"), ("random", "exact"), ("random", "selected")):
        given = [f"selection={name}", f"model.backward={backward}", *words]
        given += ["model.architecture.attention_dropout=0"] if backward == "selected" else []
        run = tmp_path / (name if backward == "exact" else backward)
        train(compose_train(run, text_corpus.folder, *given))
        logs.append([row["step"] for row in rows(run / "heldout.csv")])
    assert logs == [["0", "12"]] * 3
    windows, share = spent(tmp_path / "all", 16)
    assert windows < 30 and share <= 0.1
    assert spent(tmp_path / "random", 16)[0] == spent(tmp_path / "selected", 16)[0] == windows
    more = 2 * 16 * (windows + 1) / 16  # one window more of both, and it would be too much
    assert share * (1 + more / (2 * windows)) > 0.1
    assert "12 steps of 128 tokens, 1,536 in all: about 0:00:0" in caplog.text
    said = re.search(
        r"evaluation: 2 times, ([\d,]+) tokens \(held-out sets ([\d,]+), mask overlap ([\d,]+)\): "
        r"at most ([\d.]+)% of",
        caplog.text,
    )
    assert said is not None and float(said[4]) == pytest.approx(100 * share, abs=0.06)
    tokens = [int(said[i].replace(",", "")) for i in (1, 2, 3)]
    parts = [2 * 16 * windows, 2 * 16 * min(16, windows)]
    assert tokens == [sum(parts), *parts]
    assert f"{windows} windows are read, not 30 (data.heldout_windows)" in caplog.text


def test_a_long_run_is_evaluated_twenty_times_on_all_windows(tmp_path, text_corpus):
    words = (BY_DEFAULT, "data.heldout_windows=1", "callbacks.mask_overlap.num_windows=1")
    train(compose_train(tmp_path / "run", text_corpus.folder, *words, f"max_tokens={128 * 40}"))
    found = [row["step"] for row in rows(tmp_path / "run" / "heldout.csv")]
    assert found == [str(step) for step in range(0, 41, 2)]
    assert spent(tmp_path / "run", 16)[0] == 1


def test_an_explicit_interval_is_what_happens_with_its_price(tmp_path, text_corpus, caplog):
    caplog.set_level(logging.INFO, "slm.train")
    words = ("callbacks.heldout.every_tokens=128", "data.heldout_windows=40", "max_tokens=512")
    train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    assert [row["step"] for row in rows(tmp_path / "run" / "heldout.csv")] == list("01234")
    windows, share = spent(tmp_path / "run", 16)
    assert windows == 40 and share > 0.5
    assert re.search(r"evaluation: 5 times, 4,480 tokens \(.*\): at most [5-9]\d\.\d%", caplog.text)
    assert "windows are read, not" not in caplog.text


def test_a_run_that_goes_on_measures_the_same_windows(tmp_path, text_corpus, monkeypatch):
    words = (BY_DEFAULT, "data.heldout_windows=30")
    train(compose_train(tmp_path / "whole", text_corpus.folder, *words))
    monkeypatch.setattr("slm.train.build.StepProgress", lambda: Crash(5))
    with pytest.raises(RuntimeError, match="crash"):
        train(compose_train(tmp_path / "cut", text_corpus.folder, *words))
    monkeypatch.undo()
    train(compose_train(tmp_path / "cut", text_corpus.folder, *words))
    same_results(tmp_path / "cut", tmp_path / "whole")
    one, other = (json.loads((tmp_path / n / "lineage.json").read_text()) for n in ("cut", "whole"))
    assert one["heldout"] == other["heldout"]


def test_checkpoints_are_as_large_as_is_said(tmp_path, text_corpus, caplog):
    caplog.set_level(logging.INFO, "slm.train")
    words = ("model.architecture.hidden_size=64", "max_tokens=512", "data.heldout_windows=1")
    train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    said = re.search(
        r"checkpoints: about ([\d.]+) MB each, at most (\d+) of them \(.*\): .* MB; "
        r"model/: ([\d.]+) MB",
        caplog.text,
    )
    assert said is not None and said[2] == "4"  # two, one that is being written, the best
    found = (tmp_path / "run" / "checkpoints" / "step-00000004.ckpt").stat().st_size
    assert found / 1e6 == pytest.approx(float(said[1]), rel=0.2)
    saved = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert saved / 1e6 == pytest.approx(float(said[3]), abs=0.06)
