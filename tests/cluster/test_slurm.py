"""Under a real Slurm of two nodes: `make cluster-check`, as root in a container.

Trainings end at a time limit, in a failure, with a node that is lost, and go on; scores and corpora
are made by the jobs of an array. What they make is compared with what one process makes.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slm.store.files import hash_file, read_json

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "experiments" / "slurm"
TINY = [
    *("selection=random", "data.batch_size=8", "data.micro_batch_size=4", "max_tokens=819_200"),
    *("callbacks.metrics.every_steps=1", "callbacks.checkpoints.every_tokens=100_000_000"),
]
STEPS = 1600


def slm(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"slm.{words[0]}", *words[1:]]
    return subprocess.run(line, capture_output=True, text=True, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = (f"the sum of {i} and {i + 1} is {2 * i + 1}. " * 5 for i in range(3000))
    (folder / "a.txt").write_text("\n".join(lines))
    done = slm("prepare", f"out='{folder / 'corpus'}'", *source(folder), "tokenizer.vocab_size=300")
    assert done.returncode == 0, done.stderr
    return folder / "corpus"


def source(folder: Path) -> list[str]:
    return [f"sources=[{{path: '{folder / 'a.txt'}', document: line}}]", "seq_len=64"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> Path:
    """The run of one process that nothing ended."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = slm("train", f"data.corpus='{corpus / 'train'}'", *TINY, f"out='{out}'")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(autouse=True)
def nothing_left_running():
    """The job of a test that failed does not run beside the next one's."""
    yield
    subprocess.run(["scancel", "--full", "--me"], check=True)
    wait_until(lambda: not said_by("squeue", "--noheader"), 60)


def said_by(*line: str) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def sbatch(script: str, *words: str, options: tuple[str, ...] = (), **env: str) -> int:
    """The number of the job; its GPUs are left out."""
    line = ["sbatch", "--parsable", "--gpus-per-node=0", *options, str(SBATCH / script), *words]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    given = os.environ | {"PATH": path, "TRAINER": "default", "PER_NODE": "1"} | env
    return int(subprocess.run(line, env=given, check=True, capture_output=True, text=True).stdout)


def record(job: int) -> dict[str, str]:
    """What Slurm has of it, of the parts of an array the first."""
    said = said_by("scontrol", "show", "job", str(job))
    return dict(re.findall(r"(\w+)=(\S*)", said.split("\n\n")[0]))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def ended(job: int, seconds: float = 240) -> dict[str, str]:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: record(job)["JobState"] in over, seconds)
    return record(job)


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "train.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same(run: Path, whole: Path) -> None:
    """Each step once, with the losses of one process."""
    assert [int(row["step"]) for row in rows(run)] == list(range(1, STEPS + 1))
    losses = [[float(row["train/loss_all"]) for row in rows(one)] for one in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (run / "model" / "slm.json").exists()


# The signal comes 10 to 70 s after the start: up to 60 s earlier than it says (sbatch(1)). In a
# slice of two minutes it could come before both ranks had begun.
LIMITED = {
    "train_srun.sbatch": ("--ntasks-per-node=1", "--time=3", "--signal=USR1@110"),
    "train_torchrun.sbatch": ("--time=3", "--signal=B:USR1@110"),
}


@pytest.mark.parametrize("script", LIMITED)
def test_a_job_whose_time_is_over_goes_on(tmp_path, corpus, whole, script):
    """Its interval of checkpoints is longer than the whole run."""
    out, said = tmp_path / "run", tmp_path / "said"
    words = [f"data.corpus='{corpus / 'train'}'", *TINY, f"out='{out}'"]
    options = (*LIMITED[script], f"--output={said}")
    job = sbatch(script, *words, options=options)
    wait_until(lambda: (out / "train.csv").exists(), 60)
    record_of = ended(job, 900)
    assert (record_of["JobState"], record_of["ExitCode"]) == ("COMPLETED", "0:0"), said.read_text()
    assert int(record_of["Restarts"]) >= 1
    assert said.read_text().count("saved; the same command goes on") == int(record_of["Restarts"])
    assert_same(out, whole)


def test_a_node_that_is_lost_leaves_a_run_of_the_others(tmp_path, corpus, whole):
    """The one that does not keep the rendezvous; its agent and its process are killed."""
    out, said = tmp_path / "run", tmp_path / "said"
    words = [f"data.corpus='{corpus / 'train'}'", *TINY, f"out='{out}'"]
    words.append("callbacks.checkpoints.every_tokens=15_360")
    options = ("--time=10", "--no-kill", f"--output={said}")
    job = sbatch("train_torchrun.sbatch", *words, options=options, NODES="1:2")
    wait_until(lambda: (out / "train.csv").exists() and len(rows(out)) > 100, 90)
    lose_a_node(job)
    assert ended(job)["JobState"] in ("COMPLETED", "FAILED")  # srun tells of the agent's end
    assert_same(out, whole)


def lose_a_node(job: int) -> None:
    keeper = re.search(r":29500 .*?pid=(\d+)", said_by("ss", "-ltnp"))
    assert keeper is not None
    kept = variable(int(keeper[1]), "SLURM_NODEID")
    mine = [pid for pid in pids() if variable(pid, "SLURM_JOB_ID") == str(job)]
    lost = [pid for pid in mine if variable(pid, "SLURM_NODEID") not in ("", kept)]
    assert lost
    for pid in lost:
        if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
            os.kill(pid, signal.SIGKILL)


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def variable(pid: int, name: str) -> str:
    """Of a process; empty where it has none, or is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(rf"(?:^|\0){name}=([^\0]*)", text)
    return "" if found is None else found[1]


# ---- arrays by Hydra ----------------------------------------------------------------------------

LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=10"]


def test_a_failed_job_of_a_sweep_has_a_failing_exit_code(tmp_path, corpus):
    words = [f"data.corpus='{corpus / 'train'}'", *TINY[:3], "max_tokens=2048"]
    ratios = "selection.select_ratio=0.5,2"
    done = slm("train", "-m", *LAUNCHER, ratios, *words, f"out='{tmp_path / 'sweep'}'")
    assert done.returncode == 1 and "1 of 2 jobs failed" in done.stderr, done.stderr
    states = [read_json(path)["status"] for path in sorted(tmp_path.rglob("status.json"))]
    assert states == ["finished", "failed"]
    assert codes_of_the_last_array() == ["0:0", "1:0"]


def codes_of_the_last_array() -> list[str]:
    said = said_by("scontrol", "show", "job")
    found = re.findall(r"ArrayJobId=(\d+) ArrayTaskId=(\d+).*?ExitCode=(\d+:\d+)", said, re.DOTALL)
    last = max(int(job) for job, _, _ in found)
    return [code for job, task, code in sorted(found, key=lambda f: int(f[1])) if int(job) == last]


def test_an_array_prepares_what_one_process_does(tmp_path, corpus):
    out = tmp_path / "corpus"
    words = [*source(corpus.parent), "tokenizer.vocab_size=300", "num_proc=1"]
    done = slm("prepare", "-m", *LAUNCHER, "task=range(2)", *words, f"out='{out}'")
    assert done.returncode == 0, done.stderr
    assert contents(out / "train") == contents(corpus / "train")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.glob("*.npy"))}


def test_an_array_scores_what_one_process_does(tmp_path, corpus, whole):
    words = [f"corpus='{corpus / 'train'}'", f"reference_model='{whole / 'model'}'"]
    words += ["batch_size=4", "device=cpu"]
    alone, array = tmp_path / "alone", tmp_path / "array"
    assert slm("score", *words, f"out='{alone}'").returncode == 0
    done = slm("score", "-m", *LAUNCHER, "task=range(2)", *words, f"out='{array}'")
    assert done.returncode == 0, done.stderr
    assert contents(array) == contents(alone)
