import csv
import json
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import wandb
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.demos import BoringModel
from omegaconf import OmegaConf

import slm.hydra_names  # noqa: F401  # its resolver is in conf/logger/wandb.yaml
from slm.dynamics.wandb_media import Histogram, Lines, Page, Rows
from slm.errors import UserError
from slm.store.files import read_json
from slm.train import loggers as tracking
from slm.train.loggers import CsvLog, WandbLog
from wandb_helpers import media_file, wandb_history, wandb_records, wandb_summary

WANDB = {"project": "slm", "group": "sweep", "name": None, "job_type": "train", "tags": ["a"]}


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def wandb_log(folder: Path, mode: str = "auto") -> WandbLog:
    return WandbLog(str(folder), mode=mode, **cast(Any, WANDB))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- CSV ----------------------------------------------------------------------------------------


def test_csv_rows_are_exact_and_split_by_name(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    third = 1 / 3
    log.log_metrics({"data/tokens_seen": 320, "train/loss": third, "train/lr": 1e-30}, 10)
    heldout_loss: Any = torch.tensor(2.5)
    log.log_metrics({"heldout/a,b/loss": heldout_loss, "data/tokens_seen": 320}, 10)
    rows = read_csv(tmp_path / "train.csv")
    assert rows == [
        {"step": "10", "tokens_seen": "320", "train/loss": repr(third), "train/lr": "1e-30"}
    ]
    assert list(rows[0]) == ["step", "tokens_seen", "train/loss", "train/lr"]
    assert float(rows[0]["train/loss"]) == third
    heldout = read_csv(tmp_path / "heldout.csv")
    assert heldout == [{"step": "10", "tokens_seen": "320", "heldout/a,b/loss": "2.5"}]


def test_csv_has_a_table_for_every_prefix_of_its_own(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    for step in (0, 10, 20):
        metrics = {"dynamics/share/HH": 0.25, "dynamics_of/x": 1.0, "heldout/a/loss": 2.0}
        log.log_metrics({"data/tokens_seen": 32 * step, **metrics}, step)
    log.log_metrics({"dynamics/loss": 3.0}, 20)
    expected = {
        "train": ("dynamics_of/x", "1.0"),
        "heldout": ("heldout/a/loss", "2.0"),
        "dynamics": ("dynamics/share/HH", "0.25"),
    }
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(expected)
    for stem, (name, value) in expected.items():
        rows = read_csv(tmp_path / f"{stem}.csv")
        assert rows[1]["step"] == "10" and rows[1]["tokens_seen"] == "320"
        assert [row[name] for row in rows] == [value] * 3
    assert read_csv(tmp_path / "dynamics.csv")[2] == {
        "step": "20",
        "tokens_seen": "640",
        "dynamics/share/HH": "0.25",
        "dynamics/loss": "3.0",
    }
    CsvLog(str(tmp_path)).truncate_after(10)
    for stem in expected:
        assert [row["step"] for row in read_csv(tmp_path / f"{stem}.csv")] == ["0", "10"]


def test_csv_appends_to_what_is_there_and_takes_new_columns(tmp_path: Path) -> None:
    CsvLog(str(tmp_path)).log_metrics({"a": 1.0}, 1)
    log = CsvLog(str(tmp_path))
    log.log_metrics({"a": 2.0, "b": 3}, 2)
    log.log_metrics({"b": 4}, 3)
    assert (
        tmp_path / "train.csv"
    ).read_text() == "step,tokens_seen,a,b\n1,,1.0,\n2,,2.0,3\n3,,,4\n"
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


def test_csv_truncates_and_repairs_a_torn_line(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    for step in (10, 20, 30):
        log.log_metrics({"a": float(step)}, step)
        log.log_metrics({"heldout/x/loss": float(step)}, step)
    with open(tmp_path / "train.csv", "a") as file:
        file.write("40,,4")
    log = CsvLog(str(tmp_path))
    log.truncate_after(20)
    assert (tmp_path / "train.csv").read_text() == "step,tokens_seen,a\n10,,10.0\n20,,20.0\n"
    assert [row["step"] for row in read_csv(tmp_path / "heldout.csv")] == ["10", "20"]
    with open(tmp_path / "train.csv", "a") as file:
        file.write("30,,3")
    CsvLog(str(tmp_path)).log_metrics({"a": 31.0}, 30)
    assert [row["a"] for row in read_csv(tmp_path / "train.csv")] == ["10.0", "20.0", "31.0"]


def test_csv_of_a_run_started_over_has_no_row_twice(tmp_path: Path) -> None:
    for attempt in (1.0, 2.0):
        log = CsvLog(str(tmp_path))
        log.log_metrics({"a": attempt}, 0)
        log.log_metrics({"a": attempt}, 10)
        log.log_metrics({"b": attempt}, 10)
    text = "step,tokens_seen,a,b\n0,,2.0,\n10,,2.0,2.0\n"
    assert (tmp_path / "train.csv").read_text() == text


def test_csv_that_cannot_be_written_warns_once_and_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CsvLog(str(tmp_path))
    log.log_metrics({"a": 1.0}, 1)
    (tmp_path / "train.csv").rename(tmp_path / "kept")
    (tmp_path / "train.csv").mkdir()
    log.log_metrics({"a": 2.0}, 2)
    log.log_metrics({"a": 3.0}, 3)
    assert len(caplog.records) == 1 and "training goes on" in caplog.text
    (tmp_path / "train.csv").rmdir()
    (tmp_path / "kept").rename(tmp_path / "train.csv")
    log.log_metrics({"a": 4.0}, 4)
    assert [row["a"] for row in read_csv(tmp_path / "train.csv")] == ["1.0", "4.0"]


def test_csv_merges_hyperparameters(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    log.log_hyperparams({"seed": 0, "folder": tmp_path})
    log.log_hyperparams({"mfu": {"source": "x"}})
    found = read_json(tmp_path / "hparams.json")
    assert found == {"seed": 0, "folder": str(tmp_path), "mfu": {"source": "x"}}


# ---- Weights & Biases ---------------------------------------------------------------------------


def test_wandb_offline_two_jobs_in_one_process_and_a_continued_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "slm.train.loggers")
    first, second = wandb_log(tmp_path / "k=0.4"), wandb_log(tmp_path / "k=0.6")
    first.log_hyperparams({"selection": {"select_ratio": 0.4}})
    first.log_metrics({"train/loss": 1 / 3, "data/tokens_seen": 64}, 2)
    second.log_metrics({"train/loss": 9.0, "data/tokens_seen": 64}, 2)
    assert wandb.run is None
    ids = [log.version for log in (first, second)]
    assert ids[0] != ids[1]
    first.close()
    second.finalize("failed")

    continued = wandb_log(tmp_path / "k=0.4")
    continued.log_metrics({"train/loss": 0.25, "data/tokens_seen": 96}, 3)
    continued.finalize("success")
    assert continued.version == ids[0]

    records = wandb_records(tmp_path / "k=0.4")
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {ids[0]}
    run = runs[0]
    labels = (run.project, run.run_group, run.job_type, run.display_name, list(run.tags))
    assert labels == ("slm", "sweep", "train", "k=0.4", ["a"])
    axes = [
        (r.metric.glob_name, r.metric.step_metric)
        for r in records
        if r.WhichOneof("record_type") == "metric" and r.metric.glob_name
    ]
    assert axes[:2] == [("*", "trainer/global_step"), ("*", "data/tokens_seen")]
    updates = [
        u for r in records if r.WhichOneof("record_type") == "config" for u in r.config.update
    ]
    config = {update.key: json.loads(update.value_json) for update in updates}
    assert config["selection"] == {"select_ratio": 0.4}
    names = ("trainer/global_step", "data/tokens_seen", "train/loss")
    rows = [tuple(row[name] for name in names) for row in wandb_history(tmp_path / "k=0.4")]
    assert rows == [(2, 64, 1 / 3), (3, 96, 0.25)]

    said = [r.getMessage() for r in caplog.records if r.name == "slm.train.loggers"]
    assert len(said) == 3  # one line a start
    first_line = said[0]
    assert "no login found" in first_line and f"wandb sync {tmp_path}/k=0.4/wandb/" in first_line
    assert capfd.readouterr() == ("", "")


def test_what_wandb_does_not_take_costs_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its limits: 64 characters of a tag and of a job type, 128 of a name and of a group."""
    tags = ["ok", "x" * 65, "", "y" * 64, 7]
    long = {"group": "g" * 200, "name": "a/b" + "n" * 130, "job_type": "j" * 65, "tags": tags}
    log = WandbLog(str(tmp_path), mode="offline", **cast(Any, WANDB | long))
    log.log_metrics({"train/loss": 1.5, "data/tokens_seen": 64}, 2)
    log.finalize("success")
    assert wandb_history(tmp_path)[0]["train/loss"] == 1.5
    (run,) = [r.run for r in wandb_records(tmp_path) if r.WhichOneof("record_type") == "run"]
    assert list(run.tags) == ["ok", "y" * 64, "7"]
    for shown, given, most in [
        (run.run_group, "g", 128),
        (run.display_name, "a_bn", 128),
        (run.job_type, "j", 64),
    ]:
        assert shown.startswith(given) and len(shown) <= most
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    where = "logger.wandb.tags: "
    assert said == [
        f"{where}{'x' * 65!r} is left out, W&B takes 1 to 64 characters and it has 65",
        f"{where}'' is left out, W&B takes 1 to 64 characters and it has 0",
    ]


@pytest.mark.parametrize("project", ["a/b", "x" * 129])
def test_a_project_that_wandb_refuses_is_refused_before_training(tmp_path, project):
    with pytest.raises(UserError, match="^logger.wandb.project is '(a/b|x+)', W&B takes at most"):
        WandbLog(str(tmp_path), mode="offline", **cast(Any, WANDB | {"project": project}))


def test_wandb_offline_has_media_and_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = wandb_log(tmp_path)
    log.log_metrics({"dynamics/loss": 1.5, "data/tokens_seen": 64}, 2)
    curves = {"HH": ([0, 64], [3.0, 2.5]), "LL": ([64], [1 / 3])}
    media: dict[str, tracking.Media] = {
        "dynamics/excess_loss": Histogram(np.array([3, 0, 4]), np.array([-1.0, 0.0, 0.5, 2.0])),
        "dynamics/examples": Rows(["token", "loss"], [["\u00e4<b>", 0.1], [" x", None]]),
        "dynamics/heat_map": Page("<p>\u00e4 &lt;</p>"),
        "dynamics/lines": Lines("loss by class", curves),
    }
    log.log_media(media, 2, 64)
    log.log_summary({"dynamics/final/share/HH": 0.25})
    log.finalize("success")
    records = wandb_records(tmp_path)
    axes = [r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert axes[-1] == "data/tokens_seen"
    metrics, row = wandb_history(tmp_path)
    assert metrics["dynamics/loss"] == 1.5
    assert (row["trainer/global_step"], row["data/tokens_seen"]) == (2, 64)
    assert row["dynamics/excess_loss/_type"] == "histogram"
    assert row["dynamics/excess_loss/values"] == [3, 0, 4]
    assert row["dynamics/excess_loss/bins"] == [-1.0, 0.0, 0.5, 2.0]
    assert row["dynamics/examples/_type"] == "table-file"
    table = json.loads(media_file(tmp_path, row, "dynamics/examples"))
    assert table["columns"] == ["token", "loss"]
    assert table["data"] == [["\u00e4<b>", 0.1], [" x", None]]
    assert row["dynamics/heat_map/_type"] == "html-file"
    assert media_file(tmp_path, row, "dynamics/heat_map") == "<p>\u00e4 &lt;</p>"
    lines = json.loads(media_file(tmp_path, row, "dynamics/lines_table"))
    assert lines["data"] == [[0, "HH", 3.0], [64, "HH", 2.5], [64, "LL", 1 / 3]]
    assert wandb_summary(tmp_path)["dynamics/final/share/HH"] == 0.25
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


class BrokenMedia:
    def for_wandb(self) -> Any:
        raise OSError("the disk is full")


def test_wandb_media_that_cannot_be_made_disable_it_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    log = wandb_log(tmp_path)
    log.log_media({"x": BrokenMedia()}, 1, 32)
    wait_for(lambda: log.mode == "disabled")
    log.log_media({"x": Page("<p>")}, 2, 64)
    log.log_summary({"a": 1.0})
    log.finalize("success")
    assert [name for name, _ in run.calls if name in ("log", "summary")] == []
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "wandb failed (OSError: the disk is full); going on without it"
    ]


def test_wandb_media_are_made_on_the_thread_that_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, threads = FakeRun(), []

    class Noting:
        def for_wandb(self) -> str:
            threads.append(threading.current_thread().name)
            return "made"

    monkeypatch.setattr(wandb, "init", lambda **_: run)
    log = wandb_log(tmp_path)
    log.log_media({"x": Noting()}, 3, 96)
    log.log_summary({"a": 1.0})
    log.finalize("success")
    assert threads == ["wandb calls"]
    row = {"x": "made", "data/tokens_seen": 96, "trainer/global_step": 3}
    logged = [call for call in run.calls if call[0] in ("log", "summary")]
    assert logged == [("log", (row,)), ("summary", ({"a": 1.0},))]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_wandb_of_a_fit_is_exact_and_ends_with_it(tmp_path: Path) -> None:
    log, rates = wandb_log(tmp_path), [0.03, 1 / 3, 1e-30]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        limit_val_batches=0,
        logger=[log],
        callbacks=[
            LambdaCallback(
                on_train_batch_end=lambda trainer, *_: log.log_metrics(
                    {"train/lr": rates[trainer.global_step - 1]}, trainer.global_step
                )
            )
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(BoringModel())
    history = wandb_history(tmp_path)
    assert [row["trainer/global_step"] for row in history] == [1, 2, 3]
    assert [row["train/lr"] for row in history] == rates


def raising(*_: Any, **__: Any) -> Any:
    raise ConnectionError("the server is on fire")


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "still waiting"
        time.sleep(0.01)


class FakeRun(SimpleNamespace):
    """A wandb run whose method `broken` raises."""

    def __init__(self, broken: str = ""):
        self.calls: list[tuple[str, Any]] = []
        super().__init__(id="fake", url="https://example.org/run")
        for name in ("define_metric", "log", "finish", "log_artifact", "use_artifact"):
            setattr(self, name, raising if name == broken else self._recorder(name))
        self.config = SimpleNamespace(update=self._recorder("config"))
        self.summary = SimpleNamespace(update=self._recorder("summary"))

    def _recorder(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args or kwargs))


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_wandb_that_raises_never_reaches_the_caller(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(broken)
    monkeypatch.setattr(wandb, "init", raising if broken == "init" else lambda **_: run)
    log = wandb_log(tmp_path)
    for step in range(3):
        log.log_metrics({"a": 1.0}, step)
        time.sleep(0.05)
    log.log_hyperparams({"a": 1})
    log.finalize("success")
    log.log_metrics({"a": 1.0}, 4)
    log.finalize("success")
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "wandb failed (ConnectionError: the server is on fire); going on without it"
    ]
    assert log.mode == "disabled"


def test_wandb_that_hangs_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, released = FakeRun(), threading.Event()
    run.log = lambda _: released.wait(30)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(tracking, "FINISH_LIMIT_S", -4.8)
    log = wandb_log(tmp_path)
    log.log_hyperparams({})
    start = time.perf_counter()
    for step in range(1000):
        log.log_metrics({"a": 1.0}, step)
    log.close()
    assert time.perf_counter() - start < 20
    assert "did not finish" in caplog.text
    released.set()
    log._thread.join(5)


def test_wandb_mode_follows_login_network_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    assert tracking.resolve_mode("auto") == ("offline", "no login found")
    assert tracking.resolve_mode("online") == ("offline", "no login found")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password 0123\n")
    assert tracking.resolve_mode("online") == ("online", "")
    assert tracking.resolve_mode("auto") == ("offline", "http://127.0.0.1:9 does not answer")
    monkeypatch.setattr(tracking, "answers", lambda url: True)
    assert tracking.resolve_mode("auto") == ("online", "")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert tracking.resolve_mode("auto") == ("online", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.resolve_mode("auto")[0] == "disabled"
    with pytest.raises(ValueError, match="logger.wandb.mode is 'of'"):
        wandb_log(tmp_path, "of")


def test_wandb_disabled_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", raising)
    log = wandb_log(tmp_path / "run", "disabled")
    log.experiment.log({"a": 1})
    log.log_metrics({"a": 1.0}, 0)
    log.finalize("success")
    assert not (tmp_path / "run").exists()


def test_wandb_artifacts_are_references_and_online_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(tracking, "resolve_mode", lambda mode: (mode, ""))
    for mode in ("offline", "online"):
        log = wandb_log(tmp_path / mode, mode)
        log.log_folder(manifest, name="my corpus", kind="corpus", is_input=True)
        log.log_folder(manifest, name="model", kind="model", is_input=False)
        log.log_folder(manifest, name="dynamics-run", kind="dynamics", is_input=False)
        wait_for(
            lambda mode=mode: mode == "offline" or sum("artifact" in c for c, _ in run.calls) == 3
        )
        log.close()
    calls = [(name, args[0]) for name, args in run.calls if name.endswith("_artifact")]
    used = sorted(calls, key=lambda call: (call[0], call[1].name))
    assert [(name, item.name, item.type) for name, item in used] == [
        ("log_artifact", "dynamics-run", "dynamics"),
        ("log_artifact", "model", "model"),
        ("use_artifact", "my-corpus", "corpus"),
    ]
    entry = used[2][1].manifest.entries["manifest.json"]
    assert entry.ref == manifest.as_uri() and entry.digest != entry.ref
    assert not caplog.records


def test_every_logger_group_can_be_built(tmp_path: Path) -> None:
    conf = Path(__file__).parents[2] / "conf" / "logger"
    built = {}
    for path in sorted(conf.glob("*.yaml")):
        group = OmegaConf.merge({"run_dir": str(tmp_path)}, OmegaConf.load(path))
        nodes = [node for name, node in group.items() if name not in ("run_dir", "defaults")]
        built[path.stem] = [type(instantiate(node)) for node in nodes]
    assert built == {"csv": [CsvLog], "default": [], "none": [], "wandb": [WandbLog]}
    assert OmegaConf.load(conf / "default.yaml") == {"defaults": ["csv", "wandb"]}
