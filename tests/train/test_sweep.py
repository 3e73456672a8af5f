"""Names of jobs, what is written of each, the table; and whole sweeps under every launcher."""

import atexit
import csv
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

import warm
from common import SKETCHED
from run_helpers import TINY_MODEL, leave_strays
from slm.errors import UserError
from slm.hydra_names import job_name, sweep_group
from slm.train.sweep import Sweep, show, verdict

PARAMS = {"selection": "excess,random", "selection.select_ratio": "0.2,0.4", "seed": "0,1"}
TINY = [
    *TINY_MODEL,
    "data.batch_size=4",
    "data.micro_batch_size=2",
    "data.heldout_windows=2",
    "max_tokens=256",
]


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "given", "job", "name"),
    [
        ({}, ["-m", "k=1,2", "out=x"], ["k=1", "out=x"], "k=1"),
        ({}, ["-m", "k=1,2", "s=3,4", "out=x"], ["k=2", "s=3", "out=x"], "k=2,s=3"),
        ({}, ["-m", "init=a/b,a_b"], ["init=a_b"], "init=a_b"),
        ({}, ["-m", "init=a/b,a_b"], ["init=a/b"], "init=a_b~930238bc"),
        ({}, ["-m", "k=1,2"], ["k=" + 253 * "1"], "k=" + 253 * "1"),
        ({}, ["-m", "k=1,2"], ["k=" + 254 * "1"], "k=" + 125 * "1" + "~4e08f631"),
        ({}, ["-m", "k=1", "out=x"], ["k=1", "out=x"], "7"),
        (
            PARAMS,
            ["experiment=sweep_k", "out=x"],
            ["selection=excess", "selection.select_ratio=0.4", "seed=1", "experiment=sweep_k"],
            "selection=excess,selection.select_ratio=0.4,seed=1",
        ),
        (  # the command line fixes what the experiment sweeps over, and the other way round
            PARAMS | {"lr": "1"},
            ["experiment=e", "seed=5", "selection.select_ratio=0.3,0.5"],
            ["selection=random", "selection.select_ratio=0.3", "seed=5", "lr=1", "experiment=e"],
            "selection=random,selection.select_ratio=0.3",
        ),
        (PARAMS, ["seed=5,6"], ["selection=random", "seed=6"], "selection=random,seed=6"),
    ],
)
def test_a_job_is_named_after_what_differs(params, given, job, name):
    root = {"hydra": {"sweeper": {"params": params}, "overrides": {"task": job}}}
    assert job_name(given, 7, _root_=OmegaConf.create(root)) == name


def hydra_config(folder: Path, mode: RunMode = RunMode.MULTIRUN, number: int = 0) -> Any:
    runtime, job = {"output_dir": str(folder)}, {"num": number, "name": "train"}
    given = [f"number={number}", "selection._target_=mine.Rule", "+x={_target_: mine.X}"]
    sweep, overrides = {"dir": str(folder.parent)}, {"task": given}
    return OmegaConf.create(
        {
            "hydra": {
                "mode": mode,
                "sweep": sweep,
                "runtime": runtime,
                "job": job,
                "overrides": overrides,
            }
        }
    )


def test_a_sweep_is_one_group_and_a_single_run_none(monkeypatch, tmp_path):
    found = []
    for config in (None, hydra_config(tmp_path / "a", RunMode.RUN), hydra_config(tmp_path / "a")):
        monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
        found.append(sweep_group())
    assert found == [None, None, "-".join(tmp_path.parts[-2:])]


# ---- states -------------------------------------------------------------------------------------


def run_job(sweep: Sweep, config: Any, error: Exception | None = None) -> JobReturn:
    """What Hydra does around a job."""
    Path(config.hydra.runtime.output_dir).mkdir(exist_ok=True)
    sweep.on_job_start(config)
    done = JobReturn(status=JobStatus.COMPLETED if error is None else JobStatus.FAILED)
    done.return_value = error
    sweep.on_job_end(config, done)
    return done


def status(folder: Path) -> tuple[str, str]:
    body = json.loads((folder / "status.json").read_text())
    return body["status"], body["error"]


def complete(folder: Path, loss: float, name: str = "a") -> None:
    """What a run that is complete has."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "slm.json").write_text("{}")
    header = f"step,tokens_seen,heldout/{name}/loss,heldout/{name}/bits_per_byte\n"
    (folder / "heldout.csv").write_text(f"{header}0,0,9,1\n1,128,{loss},1\n")


def test_each_job_leaves_what_became_of_it(tmp_path, caplog):
    sweep = Sweep([])
    folders = [tmp_path / name for name in ("fine", "before", "wrong", "bug")]
    complete(folders[1], 2.0)
    errors = [None, None, UserError("k is 2, it must be 1"), ZeroDivisionError("ours")]
    with caplog.at_level(logging.ERROR):
        done = [
            run_job(sweep, hydra_config(folder, number=i), error)
            for i, (folder, error) in enumerate(zip(folders, errors, strict=True))
        ]
    assert [status(folder) for folder in folders] == [
        ("finished", ""),
        ("skipped", ""),
        ("failed", "k is 2, it must be 1"),
        ("failed", "ZeroDivisionError: ours"),
    ]
    # Hydra's sweeper raises the first failed job's error, and the sweep's end is never reached
    assert [job.status for job in done] == [JobStatus.COMPLETED] * 4
    given = [json.loads((path / "status.json").read_text())["overrides"] for path in folders]
    assert given == [["number=0"], ["number=1"], ["number=2"], ["number=3"]]
    traced = [record.exc_info is not None for record in caplog.records]
    assert traced == [False, True, False]  # a mistake; a bug with its traceback, and in one line


def test_a_complete_run_that_is_refused_is_no_failure_to_try_again(tmp_path):
    complete(tmp_path / "a", 2.0)
    run_job(Sweep([]), hydra_config(tmp_path / "a"), UserError("another run"))
    assert status(tmp_path / "a") == ("refused", "another run")
    assert verdict(["skipped", "finished"]) == ""
    assert verdict(["skipped", "refused"]).startswith("1 of 2 jobs were refused: their finished")
    both = verdict(["unfinished", "refused", "failed", "refused"])
    assert both.startswith("2 of 4 jobs failed; the same command tries them again and skips")
    assert "; 2 of 4 jobs were refused: " in both


def test_a_complete_run_that_is_made_longer_is_not_skipped(tmp_path):
    complete(tmp_path / "a", 2.0)
    sweep, config = Sweep([]), hydra_config(tmp_path / "a")
    sweep.on_job_start(config)
    (tmp_path / "a" / "model" / "slm.json").write_text('{"lineage": "of more tokens"}')
    sweep.on_job_end(config, JobReturn(status=JobStatus.COMPLETED))
    assert status(tmp_path / "a") == ("finished", "")


def test_a_single_run_leaves_no_state(tmp_path):
    run_job(Sweep([]), hydra_config(tmp_path / "a", RunMode.RUN))
    assert list((tmp_path / "a").iterdir()) == []


def test_the_end_shows_the_jobs_of_this_sweep_and_is_1_where_one_failed(tmp_path, capsys):
    earlier, sweep = Sweep([]), Sweep([])
    run_job(earlier, hydra_config(tmp_path / "old"), UserError("long ago"))
    complete(tmp_path / "b", 2.5)
    run_job(sweep, hydra_config(tmp_path / "a", number=1), UserError("k is 2"))
    run_job(sweep, hydra_config(tmp_path / "b", number=0))
    (tmp_path / "c").mkdir()
    sweep.on_job_start(hydra_config(tmp_path / "c", number=2))  # and was killed
    with pytest.raises(SystemExit) as ended:
        sweep.on_multirun_end(hydra_config(tmp_path / "a"))
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and err.startswith("slm train: 2 of 3 jobs failed; ")
    assert "2.5000" in out and "a: k is 2\n" in out and "old" not in out
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"job": "b", "status": "skipped", "a": "2.5", "error": ""},
            {"job": "a", "status": "failed", "a": "", "error": "k is 2"},
            {"job": "c", "status": "unfinished", "a": "", "error": ""},
        ]


@pytest.mark.parametrize("name", ["a/b", "loss", "x/loss", "job", "error", "losses", "[b]x[/b]"])
def test_a_set_may_have_any_name(tmp_path, capsys, name):
    sweep = Sweep([])
    complete(tmp_path / "done", 2.5, name)
    run_job(sweep, hydra_config(tmp_path / "done", number=0))
    run_job(sweep, hydra_config(tmp_path / "wrong", number=1), UserError("k is 2"))
    with pytest.raises(SystemExit):
        sweep.on_multirun_end(hydra_config(tmp_path / "done"))
    shown = capsys.readouterr().out
    assert "2.5000" in shown and name in shown and "wrong: k is 2\n" in shown
    with open(tmp_path / "sweep.csv", newline="") as file:
        done, wrong = csv.DictReader(file)
    assert (done["job"], done["status"], done["error"]) == ("done", "skipped", "")
    assert (wrong["job"], wrong["status"], wrong["error"]) == ("wrong", "failed", "k is 2")
    assert done[f"heldout/{name}" if name in ("job", "error") else name] == "2.5"


def test_a_table_that_cannot_be_made_is_no_success(tmp_path, capsys):
    sweep = Sweep([])
    run_job(sweep, hydra_config(tmp_path / "a"))
    (tmp_path / "a" / "status.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        sweep.on_multirun_end(hydra_config(tmp_path / "a"))
    assert ended.value.code == 1 and "a/status.json is not valid JSON" in capsys.readouterr().err


def test_the_end_is_0_where_none_failed(tmp_path):
    sweep = Sweep([])
    run_job(sweep, hydra_config(tmp_path / "a"))
    sweep.on_multirun_end(hydra_config(tmp_path / "a"))
    assert [row.status for row in show(tmp_path, sweep.id)] == ["finished"]


def test_a_sweep_that_is_broken_off_shows_its_table_all_the_same(tmp_path, monkeypatch, capsys):
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    monkeypatch.setattr(atexit, "unregister", lambda function: at_exit.clear())
    sweep = Sweep([])
    sweep.on_multirun_start(hydra_config(tmp_path / "a"))
    run_job(sweep, hydra_config(tmp_path / "a"))
    (function, *arguments) = at_exit[0]
    function(*arguments)
    assert "finished" in capsys.readouterr().out and (tmp_path / "sweep.csv").exists()
    sweep.on_multirun_end(hydra_config(tmp_path / "a"))
    assert at_exit == []


# ---- whole sweeps -------------------------------------------------------------------------------


MODULE = ("-m", "slm.train")


def train(
    out: Path, corpus: Path, *words: str, program: Sequence[str] = MODULE
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, "-m", "experiment=sweep_k", f"out='{out}'"]
    command += [f"data.corpus='{corpus}'", f"data.heldout={{held: '{corpus}'}}", *TINY, *words]
    return warm.run(command, capture_output=True, text=True, cwd=out.parent)


def table(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "sweep.csv", newline="") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def group_and_id(run: Path) -> tuple[str, str]:
    """As wandb knows them, from the offline file that it wrote."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    name, group = file.stem.removeprefix("run-"), "-".join(run.parent.parts[-2:])
    return group if group.encode() in file.read_bytes() else "none", name


@pytest.mark.slow
def test_a_failed_job_leaves_the_others_running_and_is_tried_again(
    tmp_path, text_corpus, make_references
):
    scores = [[-2.0] * shard.num_tokens for shard in text_corpus.shards]
    references = make_references(tmp_path / "references", text_corpus, scores)
    out = tmp_path / "sweep"
    names = [
        f"selection={s},selection.select_ratio={k}"
        for s in ("excess", "random")
        for k in (0.5, 1.0)
    ]
    (out / names[0]).mkdir(parents=True)
    (out / names[0] / "notes.txt").touch()
    words = [f"data.references='{references.folder}'", "selection.select_ratio=0.5,1.0", "seed=0"]
    done = train(out, text_corpus.folder, *words)
    assert done.returncode == 1, done.stderr
    rows = table(out)
    assert [rows[name]["status"] for name in names] == ["failed", *["finished"] * 3]
    assert "holds notes.txt and no run" in rows[names[0]]["error"]
    assert "slm train: 1 of 4 jobs failed" in done.stderr and "Traceback" not in done.stderr
    assert f"{names[0]}: " in done.stdout
    # At k = 1 either rule trains on all tokens; "random" knows them before the forward pass, and
    # has its gradients from there, so that the last digits differ.
    excess, some, every = (float(rows[name]["held"]) for name in names[1:])
    assert excess == pytest.approx(every, rel=1e-6) and excess != pytest.approx(some, rel=1e-4)

    (out / names[0] / "notes.txt").unlink()
    assert train(out, text_corpus.folder, *words).returncode == 0
    again = table(out)
    assert [again[name]["status"] for name in names] == ["finished", *["skipped"] * 3]
    assert [again[name]["held"] for name in names[1:]] == [rows[name]["held"] for name in names[1:]]
    command = [sys.executable, "-m", "slm.report", f"runs='{out}'", f"out='{tmp_path / 'report'}'"]
    assert warm.run(command, capture_output=True, after=SKETCHED).returncode == 0
    with open(tmp_path / "report" / "table.csv", newline="") as file:
        means = {row["arm"]: row["mean"] for row in csv.DictReader(file)}
    expected = dict(
        zip(
            ["excess k = 0.5", "excess k = 1", "random k = 0.5", "random k = 1"], names, strict=True
        )
    )
    assert means == {arm: str(round(float(again[job]["held"]), 6)) for arm, job in expected.items()}
    found = {group_and_id(out / name) for name in names}
    assert len(found) == 4 and {group for group, _ in found} == {f"{tmp_path.name}-sweep"}


@pytest.mark.slow
def test_a_choice_that_no_group_has_is_one_sentence_before_any_job_starts(tmp_path):
    (tmp_path / "sweep").mkdir()
    done = train(tmp_path / "sweep", tmp_path, "seed=0", "logger=csv,nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Could not find 'logger/nope'" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["multirun.yaml"]


def launch(
    folder: Path, corpus: Path, *words: str, program: Sequence[str] = MODULE
) -> dict[str, str]:
    """What became of the jobs of a launcher, which start in a folder of strays."""
    leave_strays(folder)
    words = ("selection=random", "seed=0", "logger=csv", *words)
    done = train(folder / "sweep", corpus, *words, program=program)
    rows = table(folder / "sweep")
    failed = [row["error"] for row in rows.values() if row["status"] == "failed"]
    assert done.returncode == (1 if failed else 0), done.stderr
    assert all(error.startswith("selection.select_ratio is 2") for error in failed)
    return {name: row["status"] for name, row in rows.items()}


LOKY_FORKS = """
import os, runpy, sys
from joblib.externals.loky.backend import fork_exec

start = fork_exec.fork_exec

def fork(line, keep_fds, env=None):
    if line[1] != "-m":  # it watches over resources
        return start(line, keep_fds, env)
    if pid := os.fork():
        return pid
    try:
        sys.argv = line[2:]
        runpy.run_module(line[2], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        os._exit(ended.code)
    os._exit(1)

fork_exec.fork_exec = fork
runpy.run_module("slm.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_joblib_does_the_same(tmp_path, text_corpus):
    """batch_size: both jobs in one of its processes. They are forked, and have all imports."""
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.batch_size=2"]
    words.append("selection.select_ratio=0.5,2")
    found = launch(tmp_path, text_corpus.folder, *words, program=("-c", LOKY_FORKS))
    assert found == {
        "selection.select_ratio=0.5": "finished",
        "selection.select_ratio=2": "failed",
    }


@pytest.mark.slow
def test_submitit_does_the_same(tmp_path, text_corpus):
    """In a new interpreter, which imports what unpickling needs."""
    words = ["selection.select_ratio=0.5", "hydra/launcher=submitit_local"]
    assert list(launch(tmp_path, text_corpus.folder, *words).values()) == ["finished"]
