"""What a run tells the world while it trains: CSV files, Weights & Biases.

    train.csv, heldout.csv, dynamics.csv
                             one row a logged step, columns step, tokens_seen, then metrics
    wandb/, wandb_run.json   the W&B run and its id, which a continued run keeps

Logging never stops training: a full disk or a failing wandb costs rows and one warning.
"""

import csv
import io
import json
import logging
import netrc
import os
import queue
import re
import shlex
import threading
import urllib.error
import urllib.request
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from slm.errors import UserError
from slm.names import file_name
from slm.store.files import Json, atomic_file, read_json, write_record
from slm.train.callbacks.base import TOKENS_SEEN, RewindableLogger
from slm.train.identity import run_title

log = logging.getLogger("slm.train.loggers")
OWN_TABLES = ("heldout", "dynamics")  # metrics that are logged at steps of their own
WANDB_MODES = ("auto", "online", "offline", "disabled")
MOST_OF_NAME, MOST_OF_JOB_TYPE, MOST_OF_TAG = 128, 64, 64  # characters: W&B's limits
INIT_LIMIT_S = 30.0
FINISH_LIMIT_S = 60.0


def plain(params: dict[str, Any] | Namespace) -> Json:
    """Hyperparameters as plain JSON types."""
    values = vars(params) if isinstance(params, Namespace) else dict(params)
    return json.loads(json.dumps(values, default=str))


# ---- CSV --------------------------------------------------------------------------------------


class Table:
    """A CSV file with one row a step, in order; a row is one write, a new column a rewrite.

    A row of a step that is there already completes it, and what was logged for later steps, by an
    attempt that was given up, goes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] | None = None  # None: the file was not read yet
        self.last_step = -1

    def append(self, row: dict[str, float]) -> None:
        if self.columns is None:
            self._write(self._read())
        if row["step"] <= self.last_step or not row.keys() <= set(self.columns or ()):
            self._merge(row)
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(csv_line(number(row.get(name)) for name in self.columns or ()))
        self.last_step = int(row["step"])

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, and a torn last line."""
        self._write([row for row in self._read() if int(row["step"]) <= step])

    def _merge(self, row: dict[str, float]) -> None:
        rows = [old for old in self._read() if int(old["step"]) <= row["step"]]
        same = rows.pop() if rows and int(rows[-1]["step"]) == row["step"] else {}
        rows.append(same | {name: number(value) for name, value in row.items()})
        self._write(rows)

    def _read(self) -> list[dict[str, str]]:
        """The rows whose line is whole."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes().decode(errors="replace")
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))

    def _write(self, rows: list[dict[str, str]]) -> None:
        names = dict.fromkeys(name for row in rows for name in row)
        self.columns = list(dict.fromkeys(["step", "tokens_seen", *names]))
        self.last_step = int(rows[-1]["step"]) if rows else -1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [self.columns, *([row.get(name, "") for name in self.columns] for row in rows)]
        with atomic_file(self.path) as file:
            file.write("".join(csv_line(line) for line in lines).encode())


def csv_line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def number(value: Any) -> str:
    """Full precision: float(number(x)) == x. Absent is empty."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else repr(float(value))


def table_of(metric: str) -> str:
    """The prefix that has a table of its own, else train."""
    prefix = metric.split("/")[0]
    return prefix if prefix in OWN_TABLES else "train"


class CsvLog(RewindableLogger):
    """heldout/* go to heldout.csv, dynamics/* to dynamics.csv, other metrics to train.csv.

    Hyperparameters go to hparams.json.
    """

    name, version = "csv", None  # type: ignore[assignment]  # properties in the base class

    def __init__(self, folder: str):
        self.folder, self.warned = Path(folder), False
        names = ("train", *OWN_TABLES)
        self.tables = {name: Table(self.folder / f"{name}.csv") for name in names}

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None, "a metric without a step has no row"
        keys: dict[str, float] = {"step": step}
        if TOKENS_SEEN in metrics:
            keys["tokens_seen"] = metrics[TOKENS_SEEN]
        rows: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            if name != TOKENS_SEEN:
                rows.setdefault(table_of(name), dict(keys))[name] = value
        for table, row in rows.items():
            self._attempt(self.tables[table].append, row)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        self._attempt(self._merge_hyperparams, plain(params))

    def _merge_hyperparams(self, params: Json) -> None:
        path = self.folder / "hparams.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, (read_json(path) if path.exists() else {}) | params)

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Forget what was logged after `step`: a continued run logs it again."""
        for table in self.tables.values():
            if table.path.exists():
                self._attempt(table.truncate_after, step)

    def _attempt(self, write: Callable[..., None], argument: Any) -> None:
        try:
            write(argument)
        except Exception as error:  # whatever it is, training goes on
            for table in self.tables.values():
                table.columns = None  # a last line may be torn; the next row repairs it
            if not self.warned:
                self.warned = True
                log.warning("%s: cannot write logs (%s); training goes on", self.folder, error)


# ---- Weights & Biases -------------------------------------------------------------------------


def has_login(url: str) -> bool:
    """True where wandb would find an API key: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(str(urlsplit(url).hostname)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def answers(url: str, limit_s: float = 5.0) -> bool:
    """Does a server answer, whatever it says? Compute nodes often have no way out."""
    try:
        urllib.request.urlopen(url, timeout=limit_s).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def resolve_mode(mode: str) -> tuple[str, str]:
    """(online, offline or disabled; why not online), from the mode asked for and the machine."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", mode)
    if mode in ("offline", "disabled"):
        return mode, f"mode={mode}"
    if not has_login(url):
        return "offline", "no login found"
    if mode == "auto" and not answers(url):
        return "offline", f"{url} does not answer"
    return "online", ""


def short(text: str, most: int) -> str:
    """Cut, with a hash; job folders have longer names than W&B takes."""
    return text if len(text) <= most else file_name(text, most)


def fitting_tags(tags: Sequence[Any]) -> list[str]:
    """W&B starts no run over one tag that it does not take."""
    texts = [str(tag) for tag in tags]
    for text in texts:
        if not 1 <= len(text) <= MOST_OF_TAG:
            log.warning(
                "logger.wandb.tags: %r is left out, W&B takes 1 to %d characters and it has %d",
                *(text, MOST_OF_TAG, len(text)),
            )
    return [text for text in texts if 1 <= len(text) <= MOST_OF_TAG]


class Media(Protocol):
    """A histogram, a table or the like: plain values, and how W&B wants them."""

    def for_wandb(self) -> Any: ...


class WandbLog(WandbLogger):
    """One W&B run for each folder: a continued run keeps its id, a sweep job gets a new one.

    wandb is called on a thread of its own, since a server or a disk that hangs must not hold the
    training; the first exception is reported and ends it.

    name:  null: the folder's name, or what the folder of a sweep's job says, see `run_title`
    mode:  "online", "offline", "disabled", or "auto": online where there is a login and the server
           answers, else offline; WANDB_MODE decides for "auto" where it is set
    """

    def __init__(
        self,
        folder: str,
        project: str,
        group: str | None,
        name: str | None,
        job_type: str | None,
        tags: Sequence[str],
        mode: str,
    ):
        if mode not in WANDB_MODES:
            raise UserError(f"logger.wandb.mode is {mode!r}, it must be one of {WANDB_MODES}")
        self.folder, self.mode = Path(folder), mode
        if len(project) > MOST_OF_NAME or re.search(r"[/\\#?%:]", project):
            raise UserError(
                f"logger.wandb.project is {project!r}, W&B takes at most {MOST_OF_NAME} "
                "characters, and none of /\\#?%:"
            )
        labels: Json = {
            "group": group and short(group, MOST_OF_NAME),
            "job_type": job_type and short(job_type, MOST_OF_JOB_TYPE),
            "tags": list(tags),
        }
        self.is_named = name is not None
        shown = short(name or self.folder.name, MOST_OF_NAME)
        super().__init__(shown, folder, project=project, **labels)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, started on first use; something that swallows every call where there is none."""
        if self._experiment is None and self.mode != "disabled":
            self._attempt(self._start)
        return self._experiment or _DummyExperiment()

    def _start(self) -> None:
        self.mode, reason = resolve_mode(self.mode)
        if self.mode == "disabled":
            return
        import wandb  # costs a second

        record = self.folder / "wandb_run.json"
        self._id = read_json(record)["id"] if record.exists() else uuid.uuid4().hex[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        wandb.setup(settings=wandb.Settings(silent=True))  # else logging in writes a line
        settings = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",  # sweep jobs in one process would share wandb.run
            init_timeout=INIT_LIMIT_S,
            finish_timeout=FINISH_LIMIT_S,
        )
        arguments = self._wandb_init | {"id": self._id, "mode": self.mode, "settings": settings}
        if not self.is_named:  # run.json is there by now
            arguments["name"] = short(run_title(self.folder), MOST_OF_NAME)
        arguments["tags"] = fitting_tags(arguments["tags"])
        run = self._experiment = wandb.init(**arguments)  # type: ignore
        for axis in ("trainer/global_step", TOKENS_SEEN):  # the last is the default axis
            run.define_metric(axis)
            run.define_metric("*", step_metric=axis, step_sync=True)
        write_record(record, {"id": self._id, "project": self._project, "url": run.url})
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb calls", daemon=True)
        self._thread.start()
        pattern = f"{shlex.quote(str(self.folder))}/wandb/offline-run-*-{self._id}*"
        log.info("wandb: %s", run.url or f"offline ({reason}); upload with: wandb sync {pattern}")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.mode != "disabled":
                self._attempt(call)

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, training goes on
            self.mode, self._experiment = "disabled", None
            log.warning("wandb failed (%s: %s); going on without it", type(error).__name__, error)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        run = self.experiment
        if self._experiment is not None:
            row = {**metrics, "trainer/global_step": step}
            self._calls.put(lambda: run.log(row))

    @rank_zero_only
    def log_media(self, media: Mapping[str, Media], step: int, tokens_seen: int) -> None:
        """Log them as one row; W&B's objects, which write files, are made on its thread too."""
        run = self.experiment
        if self._experiment is not None:
            keys = {TOKENS_SEEN: tokens_seen, "trainer/global_step": step}
            self._calls.put(
                lambda: run.log({name: one.for_wandb() for name, one in media.items()} | keys)
            )

    @rank_zero_only
    def log_summary(self, values: Mapping[str, float]) -> None:
        """Set what the table of runs shows: values of the run as a whole."""
        run = self.experiment
        if self._experiment is not None:
            self._calls.put(lambda: run.summary.update(dict(values)))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        run, values = self.experiment, plain(params)
        if self._experiment is not None:
            self._calls.put(lambda: run.config.update(values, allow_val_change=True))

    @rank_zero_only
    def log_folder(self, manifest: Path, *, name: str, kind: str, is_input: bool) -> None:
        """Record a folder in W&B's lineage, online only, as a reference to its manifest.

        Nothing is uploaded; the manifest, checksummed, holds the hashes of the folder's files.
        """
        if self.mode in ("offline", "disabled"):  # without starting a run that has ended
            return
        run = self.experiment
        if self._experiment is None or self.mode != "online":
            return
        import wandb

        def call() -> None:
            safe = re.sub(r"[^\w.-]", "-", short(name, MOST_OF_NAME))
            artifact = wandb.Artifact(safe, type=kind)
            artifact.add_reference(manifest.resolve().as_uri(), checksum=True)
            record = run.use_artifact if is_input else run.log_artifact
            record(artifact)

        # use_artifact waits for the server, so it would hold up the metrics.
        threading.Thread(target=self._attempt, args=(call,), daemon=True).start()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.close(exit_code=int(status == "failed"))

    def close(self, exit_code: int = 0) -> None:
        """End the run; what is logged afterwards continues it under the same id."""
        run, self._experiment = self._experiment, None
        if run is None:
            return
        self._calls.put(lambda: run.finish(exit_code=exit_code))
        self._calls.put(None)
        self._thread.join(FINISH_LIMIT_S + 5)
        if self._thread.is_alive():
            log.warning("wandb did not finish in %.0f s; leaving it behind", FINISH_LIMIT_S)
