"""What a run's record says of it."""

import json
from pathlib import Path

import pytest

from run_helpers import train
from slm.errors import UserError
from slm.train.identity import run_title
from train_helpers import command, compose_train
from warm import run


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("selection=excess,selection.select_ratio=0.6,seed=1", "excess k = 0.6, seed 1"),
        ("selection=excess,lr=0.1,seed=1", "excess k = 0.6, seed 1, lr=0.1"),
        ("mine", "mine"),
    ],
)
def test_a_sweeps_job_is_named_as_people_say_it(tmp_path: Path, name: str, expected: str) -> None:
    folder = tmp_path / name
    assert run_title(folder) == name  # before it has begun
    folder.mkdir()
    identity = {"seed": 1, "selection.rule": "excess", "selection.select_ratio": 0.6}
    (folder / "run.json").write_text(json.dumps(identity))
    assert run_title(folder) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["max_tokens=1"],  # before the run has a folder
        ["selection=excess"],  # when it has one
        ["data.batch_size=3", "data.micro_batch_size=2"],  # and a trainer
    ],
)
def test_a_run_that_is_refused_leaves_nothing(tmp_path, made_corpus, words):
    out, kept = tmp_path / "deep" / "run", tmp_path / "kept"
    kept.mkdir()
    for folder in (out, kept):
        refused = run(command(folder, made_corpus.folder, *words), capture_output=True, text=True)
        assert refused.returncode == 1 and refused.stderr.count("\n") <= 2, refused.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    with pytest.raises(UserError):
        train(compose_train(out, made_corpus.folder, *words))
    assert not (tmp_path / "deep").exists()
