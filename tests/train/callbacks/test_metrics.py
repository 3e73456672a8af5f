import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from model_helpers import small_llama
from slm import console
from slm.model.flops import flops_per_token, forward_flops_per_token
from slm.selection import books
from slm.selection.books import StepResult, TokenRecord
from slm.train.callbacks import metrics as progress
from slm.train.callbacks.base import StepProgress, step_ended, summary
from slm.train.callbacks.metrics import Metrics, measured_peak
from slm.train.loggers import CsvLog

SEQ_LEN, BATCH = 8, 4


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- metrics of a fit ---------------------------------------------------------------------------


SUMS = dict.fromkeys(books.SUMS, 0.0) | {
    "num_selected": 10.0,
    "num_trained": 12.0,
    "num_valid": 20.0,
}


# Of two tokens the first was selected.
RECORD = TokenRecord(
    torch.zeros(1, dtype=torch.int64),
    torch.tensor([[True, True]]),
    torch.tensor([[True, False]]),
    torch.tensor([[2.0, 1.0]]),
    torch.tensor([[0.5, 1.5]]),
    torch.tensor([[1.0, 0.0]]),
)


class FakeData(LightningDataModule):
    tokens_per_step = BATCH * SEQ_LEN
    micro_batch_size = BATCH
    corpus = SimpleNamespace(seq_len=SEQ_LEN, manifest={"sources": ["one"]})
    windows = SimpleNamespace(corpus=corpus, sources=lambda windows: np.zeros((1, 2), np.int64))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(cast(Any, [torch.zeros(1)] * 1000), batch_size=1)


class FakeModule(LightningModule):
    """Its loss in optimizer step n is n, exactly, interrupted or not."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.lm, self.weight = nn.Module(), nn.Parameter(torch.zeros(()))
        self.lm.model, self.lm.backward = model, "exact"  # type: ignore
        self.selection, self.online = SimpleNamespace(scope="batch"), ()
        self.tokens_selected = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * 0.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens_selected += 16 // self.trainer.accumulate_grad_batches

    def step_result(self) -> StepResult:
        step = self.trainer.global_step
        return StepResult(SUMS | {"loss_valid": 20.0 * step}, 12.0, 0.5, 0.5, 3.0, [RECORD])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.weight], lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recorder(Logger):
    """Any second logger, which cannot forget."""

    name, version = "recorder", None  # type: ignore[assignment]  # properties in the base class

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None: ...


def fit(
    folder: Path,
    steps: int,
    resume: Path | None = None,
    loggers: list[Any] | None = None,
    more: Sequence[Callback] = (),
    callbacks: Sequence[Callback] | None = None,
):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        logger=[CsvLog(str(folder))] if loggers is None else loggers,
        callbacks=list(callbacks or [Metrics(every_steps=3), StepProgress(), *more]),
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(
        FakeModule(small_llama()),
        datamodule=FakeData(),
        ckpt_path=None if resume is None else str(resume),
        weights_only=True,
    )
    return trainer


def without_speed(path: Path) -> list[dict[str, str]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in read_csv(path)
    ]


class Pause(Callback):
    """What an evaluation of 1000 s does to the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.patch, self.clock = monkeypatch, time.perf_counter

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            self.patch.setattr(time, "perf_counter", lambda: self.clock() + 1000)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_speed_is_of_a_step_and_not_of_what_interrupts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, 3, more=[Pause(monkeypatch)])
    (row,) = read_csv(tmp_path / "train.csv")
    assert float(row["perf/step_s"]) < 300


class Clock(Callback):
    """Step n takes n s; what comes after it, 1000 s."""

    now_s = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.now_s += (trainer.global_step + 1) / 2  # of its two micro-batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.now_s += 1000 * step_ended(trainer, batch_idx)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_step_s_is_the_median_of_the_last_steps(tmp_path, monkeypatch):
    clock, metrics = Clock(), Metrics(every_steps=3)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    monkeypatch.setattr(progress, "peak_flops", lambda *_: progress.Peak(None, "none"))
    fit(tmp_path, 12, callbacks=[metrics, clock, progress.StepClock(metrics)])
    found = [float(row["perf/step_s"]) for row in read_csv(tmp_path / "train.csv")]
    assert found == [2.0, 3.5, 5.0, 8.0]  # of 1 to 3, 1 to 6, 1 to 9, 4 to 12
    assert metrics.train_seconds == sum(range(1, 13))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch")
def test_a_continued_fit_logs_what_an_uninterrupted_one_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    other = Recorder()
    fit(tmp_path / "whole", 10, loggers=[CsvLog(str(tmp_path / "whole")), other])
    rows = read_csv(tmp_path / "whole" / "train.csv")
    assert [row["step"] for row in rows] == ["3", "6", "9", "10"]
    assert [float(row["train/loss_all"]) for row in rows] == [3.0, 6.0, 9.0, 10.0]
    assert [float(row["train/lr"]) for row in rows] == [0.03, 0.06, 0.09, 0.1]  # the rate used
    assert [int(row["tokens_seen"]) for row in rows] == [3 * 32, 6 * 32, 9 * 32, 10 * 32]
    assert int(rows[0]["data/tokens_selected"]) == 3 * 16 - 8  # the module counts after us here
    for row in rows:
        step_s, speed = float(row["perf/step_s"]), float(row["perf/tokens_per_s"])
        assert speed == 32 / step_s and 0 < float(row["perf/mfu"]) < 1
        # Importing torch takes more; neither KiB nor pages fit in between.
        assert 50 * 2**20 < int(row["perf/peak_memory_bytes"]) < 2**36
    assert "measured here" in (tmp_path / "whole" / "hparams.json").read_text()

    assert [step for step, _ in other.rows] == [3, 6, 9, 10]
    assert [repr(row["train/lr"]) for _, row in other.rows] == [row["train/lr"] for row in rows]

    trainer = fit(tmp_path / "cut", 4)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    CsvLog(str(tmp_path / "cut")).log_metrics({"train/loss": 7.0}, 6)  # from after the checkpoint
    fit(tmp_path / "cut", 10, resume=tmp_path / "at4.ckpt")
    rows = without_speed(tmp_path / "cut" / "train.csv")
    assert [row["step"] for row in rows] == ["3", "4", "6", "9", "10"]
    names = set(rows[0]) - {"data/tokens_selected"}  # the fake does not save that one
    expected = without_speed(tmp_path / "whole" / "train.csv")
    for row, wanted in zip([rows[0], *rows[2:]], expected, strict=True):
        assert {name: row[name] for name in names} == {name: wanted[name] for name in names}

    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train 1/10  ")
    assert lines[3].startswith("train 4/10  loss_all 3.0000  kept 50.0%  ")
    assert "tokens/s  0:00:0" in lines[3] and lines[3].endswith(" left")
    assert lines[10].startswith("train 10/10  loss_all 10.0000") and lines[10].endswith(" in all")


# ---- speed and progress -------------------------------------------------------------------------


def test_flops_of_a_run_count_every_token_once_and_its_online_reference() -> None:
    model, metrics = small_llama(), Metrics(every_steps=1)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(corpus=SimpleNamespace(seq_len=16)))
    unselected, selected = (flops_per_token(model, 16, share) for share in (0.0, 1.0))
    for online in ((), (SimpleNamespace(model=model),)):
        lm = SimpleNamespace(model=model, backward="exact")
        module: Any = SimpleNamespace(lm=lm, online=online)
        metrics.setup(trainer, module, "fit")
        forward = forward_flops_per_token(model, 16)
        assert forward is not None and selected is not None and unselected is not None
        scoring = 100 * forward * len(online)
        assert metrics.flops(100, 60) == 60 * selected + 40 * unselected + scoring
    metrics.flops_unselected = None
    assert metrics.flops(100, 60) is None


def test_peak_is_quick_repeatable_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    start = time.process_time()
    peak = measured_peak.__wrapped__(torch.float32, 1)
    assert time.process_time() - start < 1  # 0.16 s
    assert peak.flops_per_s is not None and 1e8 < peak.flops_per_s < 1e14
    assert "measured here: 512x512 matmul, torch.float32" in peak.source
    assert torch.equal(torch.get_rng_state(), state)


def test_peak_of_gpus_is_dense_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    for name, flops in {
        "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 NVL": None,
        "A board of next year": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert progress.peak_flops(device, "bf16-mixed").flops_per_s == flops
    assert progress.peak_flops(torch.device("meta"), "32-true").flops_per_s is None


def test_a_bar_on_the_terminal_counts_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    bar = StepProgress()
    bar.show({"train/loss_all": 3.25, "slm/kept_frac": 0.6, "perf/tokens_per_s": 12345.6})
    bar.show({"heldout/x/loss": 1.0})  # says nothing that the bar shows
    trainer: Any = SimpleNamespace(global_step=5, max_steps=10, accumulate_grad_batches=1)
    bar.on_train_start(trainer, None)
    trainer.global_step = 6
    bar.on_train_batch_end(trainer, None, None, None, 0)
    bar.on_exception(trainer, None, ValueError())
    text = terminal.getvalue()
    assert "6/10" in text and "loss_all 3.2500  kept 60.0%  12,346 tokens/s" in text


def test_progress_before_training_starts_has_nothing_to_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer: Any = SimpleNamespace(global_step=0)
    StepProgress().on_exception(trainer, None, ValueError())
    assert capsys.readouterr().err.strip() == ""


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = StepProgress()
    bar.disable()
    trainer: Any = SimpleNamespace(global_step=0, max_steps=1, accumulate_grad_batches=1)
    bar.on_train_start(trainer, None)
    bar.on_train_batch_end(trainer, None, None, None, 0)
    bar.on_train_end(trainer, None)
    assert capsys.readouterr().err == ""


def test_lines_wait_for_their_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    bar = StepProgress()
    bar.show({"train/loss_all": 3.25})
    trainer: Any = SimpleNamespace(global_step=20, max_steps=140, accumulate_grad_batches=1)
    bar.on_train_start(trainer, None)
    for _ in range(40):
        now[0] += 2.0
        bar.on_train_batch_end(trainer, None, None, None, 0)
    bar.on_train_end(trainer, None)
    bar.on_train_end(trainer, None)
    assert capsys.readouterr().err.splitlines() == [
        "train 35/140  loss_all 3.2500  0:03:30 left",
        "train 50/140  loss_all 3.2500  0:03:00 left",
        "train 60/140  loss_all 3.2500  0:01:20 in all",
    ]
    assert summary({}) == ""
