"""What a sweep adds to its jobs: their folders' names, their states, one table at the end.

    slm train -m experiment=sweep_k ...                                  one job after the other
    slm train -m experiment=sweep_k hydra/launcher=joblib ...            several on this machine
    slm train -m experiment=sweep_k hydra/launcher=submitit_slurm ...    jobs of a cluster

    <out>/<job>/status.json   running, finished, skipped (was complete already), failed, or refused
                              (failed over a complete run, which stays), and why;
                              what the job was given, whole (a folder's name may be cut),
                              but for classes: run.json has their words
    <out>/sweep.csv           the table of the last sweep in this folder

A job may run in a process that a launcher started. sys.argv is not the user's there, and only
what unpickling needs is imported: the callback, hence this module, and through it the resolvers.
"""

import atexit
import gc
import logging
import sys
import uuid
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import slm.hydra_names  # noqa: F401  # the configuration's resolvers
from slm.errors import UserError, fail, reported
from slm.jobs import ExitCode
from slm.store.files import read_json, remove_empty, write_csv, write_record
from slm.train.curves import final_losses

log = logging.getLogger("slm.train.sweep")
STATUS = "status.json"
COMPLETE = ("finished", "skipped")
COLUMNS = ("job", "status", "error")  # of sweep.csv; the others are held-out sets
WIDTH = 160  # of a table that goes to a file


# ---- states -------------------------------------------------------------------------------------


class Sweep(ExitCode):
    """Hydra calls it around every job, in the job's process, and at the sweep's end.

    A failed job is written down and then told to Hydra as completed: else the sweep would stop at
    the first failure without its end, and a launcher would have to pickle any exception.
    """

    def __init__(self, given: Sequence[str]):
        super().__init__()
        self.id = uuid.uuid4().hex  # a folder may hold jobs of an earlier sweep
        self.given = given  # resolving it in the sweep's configuration is what caches it
        self.model = ""  # what this job's folder held before

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Hydra makes the folder of a run before anybody knows whether there will be one."""
        if OmegaConf.is_missing(config, "out"):  # which the command says
            return
        folder = Path(config.hydra.run.dir).absolute()
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        atexit.register(remove_empty, made)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        super().on_job_start(config)
        if config.hydra.mode == RunMode.MULTIRUN:
            import_module(
                "slm.train.command"
            )  # for its log levels and filters, which are not pickled
            self.model = model_record(config)
            self._write(config, "running")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        super().on_job_end(config, job_return)
        is_old = self.model != "" and model_record(config) == self.model
        if job_return.status == JobStatus.FAILED:
            error, status = sentence(job_return._return_value), "refused" if is_old else "failed"
            log.error("%s: %s: %s", status, job_folder(config), error)
            self._write(config, status, error)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        else:
            self._write(config, "skipped" if is_old else "finished")
        gc.collect()  # trainer and model refer to each other; the next job needs their memory

    def _write(self, config: DictConfig, status: str, error: str = "") -> None:
        number, given = config.hydra.job.num, list(config.hydra.overrides.task)
        body = {"sweep": self.id, "number": number, "status": status, "error": error}
        body["overrides"] = [word for word in given if "_target_" not in word]
        write_record(job_folder(config) / STATUS, body)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """The table is shown in any case: a killed job ends some launchers, Ctrl-C all of them."""
        atexit.register(show, Path(config.hydra.sweep.dir).absolute(), self.id)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        atexit.unregister(show)
        try:
            rows = show(Path(config.hydra.sweep.dir), self.id)
        except Exception as error:  # Hydra makes a warning of it, and exit code 0
            fail("train", f"the table of the sweep: {sentence(error)}")
        if said := verdict([row.status for row in rows]):
            fail("train", said)


def verdict(states: Sequence[str]) -> str:
    """What to do about the jobs that did not end well; empty where all did."""
    refused = states.count("refused")
    failed = sum(state not in COMPLETE for state in states) - refused
    said = []
    if failed:
        again = "the same command tries them again and skips what is finished"
        said.append(f"{failed} of {len(states)} jobs failed; {again}")
    if refused:
        what = "their finished runs are as they were, and the errors above say what to change"
        said.append(f"{refused} of {len(states)} jobs were refused: {what}")
    return "; ".join(said)


def model_record(config: DictConfig) -> str:
    """Of a complete job; one that is made longer writes another."""
    path = job_folder(config) / "model" / "slm.json"
    return path.read_text() if path.exists() else ""


def job_folder(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.output_dir)


def sentence(error: Exception) -> str:
    """What the table says of a failed job; a bug's traceback is logged here, where it happened."""
    mine = reported(error)
    if mine is None:
        log.error("a job failed", exc_info=error)
    return f"{type(error).__name__}: {error}" if mine is None else str(mine)


class Row(NamedTuple):
    """One job in the table."""

    job: str  # its folder below the sweep's
    status: str
    losses: dict[str, float]  # the last on every held-out set
    error: str


def sweep_rows(folder: Path, sweep: str) -> list[Row]:
    """One row a job of this sweep, in their order."""
    found = [(path.parent, read_json(path)) for path in folder.rglob(STATUS)]
    mine = [(run, state) for run, state in found if state["sweep"] == sweep]
    rows = []
    for run, state in sorted(mine, key=lambda job: job[1]["number"]):
        losses = final_losses(run) if state["status"] in COMPLETE else {}
        status = "unfinished" if state["status"] == "running" else state["status"]
        rows.append(Row(str(run.relative_to(folder)), status, losses, state["error"]))
    return rows


def show(folder: Path, sweep: str) -> list[Row]:
    """Print the table, with the errors below it, and write it to sweep.csv; returns its rows."""
    rows = sweep_rows(folder, sweep)
    if not rows:  # no job was started, so what is wrong has been said
        return rows
    sets = list(dict.fromkeys(name for row in rows for name in row.losses))
    table = Table("job", "status", *map(escape, sets))
    for row in rows:
        losses = [f"{row.losses[name]:.4f}" if name in row.losses else "" for name in sets]
        table.add_row(escape(row.job), row.status, *losses)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    for row in rows:
        if row.error:
            print(f"{row.job}: {row.error}")
    try:
        write_csv(folder / "sweep.csv", [csv_row(row, sets) for row in rows])
    except (OSError, UserError) as error:
        log.warning("%s", error)
    return rows


def csv_row(row: Row, sets: Sequence[str]) -> dict[str, Any]:
    """A column a set under its name; one named like another column has heldout/ before it."""
    losses = {name: row.losses[name] if name in row.losses else "" for name in sets}
    named = {f"heldout/{k}" if k in COLUMNS else k: loss for k, loss in losses.items()}
    return {"job": row.job, "status": row.status} | named | {"error": row.error}
