"""What a run's record says of it."""

import json
from pathlib import Path

import pytest

from slm.train.identity import run_title


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
