"""A run that is made longer against the longer run: weights and logs, bit for bit, or a refusal."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from run_helpers import train
from slm.errors import UserError
from slm.train.extend import same_steps
from slm.train.optim import warmup_cosine, warmup_stable_decay
from slm.verify import verify
from train_helpers import Crash, compose_train, rows, same_results

STEP = 8 * 16  # tokens
STAYS = ("optimizer=wsd", "optimizer.schedule.warmup_steps=2")
CONSTANT = (*STAYS, "optimizer.schedule.decay_fraction=0")
DECAYS = (*STAYS, "optimizer.schedule.decay_fraction=0.25")


def run(folder: Path, corpus: Path, steps: int, *words: str) -> None:
    train(compose_train(folder, corpus, f"max_tokens={steps * STEP}", *words))


def test_a_run_without_decay_is_made_longer_twice(tmp_path, text_corpus, caplog):
    """Held-out losses are due every third step, checkpoints every second."""
    caplog.set_level(logging.INFO, "slm.train")
    corpus = text_corpus.folder
    run(tmp_path / "whole", corpus, 12, *CONSTANT)
    for steps in (6, 9, 12):
        run(tmp_path / "grown", corpus, steps, *CONSTANT)
    same_results(tmp_path / "grown", tmp_path / "whole")
    assert "is made longer, from 1,152 to 1,536 tokens: as the longer run" in caplog.text
    names = {path.name for path in (tmp_path / "grown").glob("model*")}
    assert names == {"model", f"model-{6 * STEP}", f"model-{9 * STEP}"}
    assert all(whole for _, whole, _ in verify(tmp_path / "grown"))
    one, other = (
        json.loads((tmp_path / name / "lineage.json").read_text()) for name in ("grown", "whole")
    )
    for field in ("tokens_seen", "tokens_selected", "train_flops", "selection"):
        assert one[field] == other[field]


def test_with_a_decay_it_goes_on_from_before_it(tmp_path, text_corpus):
    """Of 8 steps the last two decay, of 12 the last three; the checkpoint of step 6 is left."""
    corpus = text_corpus.folder
    run(tmp_path / "whole", corpus, 12, *DECAYS)
    run(tmp_path / "grown", corpus, 8, *DECAYS)
    short = float(rows(tmp_path / "grown" / "train.csv")[6]["train/lr"])
    run(tmp_path / "grown", corpus, 12, *DECAYS)
    same_results(tmp_path / "grown", tmp_path / "whole")
    assert short < float(rows(tmp_path / "grown" / "train.csv")[6]["train/lr"]) == 0.01


def test_an_unfinished_run_and_a_longer_one_that_is_stopped(tmp_path, text_corpus, monkeypatch):
    corpus = text_corpus.folder
    run(tmp_path / "whole", corpus, 12, *CONSTANT)
    for steps, crash in ((8, 5), (12, 7), (12, 11)):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
            patch.setattr("slm.train.build.StepProgress", lambda crash=crash: Crash(crash))
            run(tmp_path / "grown", corpus, steps, *CONSTANT)
    run(tmp_path / "grown", corpus, 12, *CONSTANT)
    same_results(tmp_path / "grown", tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "same"), [((), 0), ((*DECAYS, "callbacks.checkpoints.every_tokens=100_000"), 6)]
)
def test_a_schedule_that_looks_at_the_end_is_named(tmp_path, text_corpus, words, same):
    folder = tmp_path / "run"
    run(folder, text_corpus.folder, 8, *words)
    before = (folder / "run.json").read_bytes(), (folder / "model" / "slm.json").read_bytes()
    with pytest.raises(UserError) as refused:
        run(folder, text_corpus.folder, 12, *words)
    kind = "warmup_stable_decay" if words else "warmup_cosine"
    said = str(refused.value)
    assert f"max_tokens is {8 * STEP} in run.json, {12 * STEP} now" in said
    assert f"with the schedule {kind} the longer run has the same learning rates up to step" in said
    if words:
        assert f"up to step {same} of 8 alone, where no checkpoint is left" in said
    after = (folder / "run.json").read_bytes(), (folder / "model" / "slm.json").read_bytes()
    assert after == before
    run(folder, text_corpus.folder, 8, *words)  # it is whole, and complete


def test_fewer_tokens_and_other_settings_are_another_run(tmp_path, text_corpus):
    folder = tmp_path / "run"
    run(folder, text_corpus.folder, 6, *CONSTANT)
    with pytest.raises(UserError, match="another run: max_tokens is 768 in run.json, 512 now"):
        run(folder, text_corpus.folder, 4, *CONSTANT)
    with pytest.raises(UserError, match="another run: optimizer.schedule.warmup_steps is 2 in"):
        run(folder, text_corpus.folder, 8, *CONSTANT, "optimizer.schedule.warmup_steps=3")


def test_steps_at_the_same_rates_by_hand():
    def cosine(optimizer: Any, steps: int) -> Any:
        return warmup_cosine(optimizer, steps, warmup_fraction=0.1, final_fraction=0.1)

    def stays(optimizer: Any, steps: int) -> Any:
        return warmup_stable_decay(
            optimizer, steps, warmup_steps=5, decay_fraction=0.2, final_fraction=0.0
        )

    assert same_steps(cosine, 100, 200) == 0  # its warm-up is a part of the run
    assert same_steps(stays, 100, 200) == 80
    assert same_steps(stays, 100, 110) == 80
    with pytest.raises(UserError, match="this one is a ReduceLROnPlateau"):
        same_steps(lambda optimizer, steps: ReduceLROnPlateau(optimizer), 3, 4)


def test_rates_of_a_warmup_a_stay_and_a_decay():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    schedule = warmup_stable_decay(
        optimizer, 10, warmup_steps=4, decay_fraction=0.3, final_fraction=0.1
    )
    rates = [2 * schedule.lr_lambdas[0](step) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 1.4, 0.8, 0.2])
