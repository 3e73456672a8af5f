"""`slm prepare` in the tasks of datatrove and on actors of Ray: `make machines-check`.

The scripts of experiments/prepare_machines run as they stand, with units of a few KB; what they
make is compared with what one process makes. The libraries are those of machines.txt.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slm.prepare.command import Prepared, prepare
from text_helpers import files, write_records

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments" / "prepare_machines"
LIBRARIES = Path(sys.prefix) / "machines"
SMALL_UNITS = "import slm.prepare.scan\nslm.prepare.scan.UNIT_BYTES = 40_000\n"


@pytest.fixture
def given(tmp_path) -> Path:
    """Four files, of which datatrove's filter in the example keeps two documents of three."""
    for number in range(4):
        rows = [{"text": f"{number} {i}: " + "some text " * (10 + i % 3 * 15)} for i in range(400)]
        write_records(tmp_path / "in" / f"{number}.jsonl", *rows)
    return tmp_path / "in"


def run(tmp_path: Path, script: str, *words: object) -> str:
    """What it prints last."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SMALL_UNITS)
    path = os.pathsep.join([str(tmp_path / "site"), str(LIBRARIES)])
    line = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return (done.stdout.splitlines() or [""])[-1]


def alone(out: Path, source: dict[str, str], tokenizer: str, **more: Any) -> Prepared:
    return prepare([source], out, tokenizer={"path": tokenizer}, num_proc=1, **more)


def test_tasks_of_datatrove_make_one_corpus_of_what_its_filters_keep(tmp_path, given, bytes_folder):
    run(tmp_path, "datatrove_step.py", given, tmp_path / "out", bytes_folder, 3)
    kept = tmp_path / "out" / "filtered"
    lines = [line for path in kept.iterdir() for line in path.read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == sum(i % 3 > 0 for i in range(400)) * 4
    alone(tmp_path / "alone", {"path": str(kept), "name": "filtered"}, bytes_folder)
    assert files(tmp_path / "out" / "corpus") == files(tmp_path / "alone")


def test_actors_of_ray_make_one_corpus(tmp_path, given, bytes_folder):
    said = run(tmp_path, "ray_actors.py", given, tmp_path / "out", bytes_folder, 2)
    made = alone(tmp_path / "alone", {"path": str(given), "name": "given"}, bytes_folder)
    assert made.train is not None and said == made.train.fingerprint
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_tokens_of_datatrove_have_the_fingerprint_of_the_text(tmp_path, given, bytes_folder):
    said = run(tmp_path, "tokens_of_datatrove.py", given, tmp_path / "out", bytes_folder)
    source = {"path": str(given)}
    made = alone(tmp_path / "alone", source, bytes_folder, heldout_ratio=0)
    assert made.train is not None and said == made.train.fingerprint
