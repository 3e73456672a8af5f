"""Every row has a key in conf/, every key a row; what Lightning would do by itself is refused."""

from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from run_helpers import composed, train
from slm.checks import ABSENT, select
from slm.cli import plain_settings
from slm.errors import UserError
from slm.train import build as building
from slm.train.keys import TRAIN, check_train
from train_helpers import compose_train

OF_LIGHTNING = {"benchmark", "detect_anomaly", "profiler", "sync_batchnorm", "default_root_dir"}


def settings(*overrides: str) -> Any:
    words = ["out=x", "run_dir=x", "max_tokens=1", "data.corpus=c", *overrides]
    return plain_settings(composed("train", *words))


def test_every_row_is_a_key_of_the_configuration():
    words = ["callbacks=dynamics", "callbacks.dynamics.corpus=c"]
    configs = [settings(*words, f"optimizer={name}") for name in ("adamw", "wsd")]
    configs.append(settings("trainer=fsdp"))
    absent = {key for key in TRAIN if all(select(one, key) is ABSENT for one in configs)}
    assert absent == {f"trainer.{name}" for name in OF_LIGHTNING}
    for config in configs:
        check_train(config)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+trainer.max_time=00:00:00:01", "trainer.max_time is given, max_tokens alone says how"),
        ("+trainer.max_steps=3", "trainer.max_steps is given, max_tokens alone says how"),
        ("+trainer.max_epochs=1", "trainer.max_epochs is given, max_tokens alone says how"),
        ("+trainer.limit_train_batches=2", "limit_train_batches is given, which would end the run"),
        ("+trainer.overfit_batches=2", "overfit_batches is given, which would end the run"),
        ("+trainer.fast_dev_run=true", "fast_dev_run is given, which would end the run"),
        ("+trainer.accumulate_grad_batches=2", "accumulate_grad_batches is given, data.batch_size"),
        ("+trainer.gradient_clip_val=1.0", "gradient_clip_val is given, optimizer.gradient_clip"),
        ("+trainer.callbacks=[]", "trainer.callbacks is given, and nothing reads it"),
        ("+foo=1", "foo is given, and nothing reads it"),
        ("+max_token=1", "max_token is given, .* did you mean max_tokens?"),
        ("+optimizer.foo=1", "optimizer.foo is given, and nothing reads it"),
        ("+optimizer.adamw.foo=1", "optimizer.adamw.foo is given, and nothing reads it"),
        ("+data.batchsize=1", "data.batchsize is given, .* did you mean data.batch_size?"),
        (
            "+callbacks.checkpoints.kep=3",
            "kep is given, .* mean callbacks.checkpoints.keep?",
        ),
        ("+callbacks.chekpoints={keep: 3}", "callbacks.chekpoints has no _target_"),
        (
            "trainer.strategy=fsdp",
            "trainer.strategy is 'fsdp', which is FSDP1: trainer=fsdp shards",
        ),
        ("trainer.strategy=deepspeed_stage_2", "trainer.strategy is 'deepspeed_stage_2', it must"),
        ("trainer.strategy=ddp_spawn", "trainer.strategy is 'ddp_spawn', it must be one of"),
        (
            "trainer.strategy={_target_: lightning.pytorch.strategies.FSDPStrategy}",
            "trainer.strategy makes a FSDPStrategy, it must be a DDPStrategy",
        ),
        (
            "trainer.strategy={_target_: lightning.pytorch.strategies.ModelParallelStrategy}",
            "trainer.strategy makes a ModelParallelStrategy, .* trainer=fsdp is FSDP2",
        ),
        (
            "trainer.strategy={_target_: slm.train.sharded.Sharded, cpu_offload: 1}",
            "trainer.strategy.cpu_offload is 1, it must be true or false",
        ),
        (
            "optimizer.adamw={_target_: slm.train.optim.adamw, _partial_: true, lr: 0.1, betas: "
            "[0.9, 0.9], eps: 1e-8, weight_decay: 0.1, fused: true, foreach: true}",
            "optimizer.adamw.foreach and fused are both true",
        ),
        (
            "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, "
            "start_method: fork}",
            "trainer.strategy makes a DDPStrategy, it must be a DDPStrategy that starts its proces",
        ),
        ("trainer.accelerator=abacus", "accelerator is 'abacus', it must be one of .*'gpu'"),
        (
            "trainer.deterministic=abc",
            "trainer.deterministic is 'abc', it must be true or false, or",
        ),
        ("selection.select_ratio=nan", "selection.select_ratio is nan, it must be a number in"),
        ("selection.select_ratio=''", "selection.select_ratio is '', it must be a number in"),
        ("modules=3", "modules is 3, it must be a list of at least 0, each a text"),
        ("data.corpus=3", "data.corpus is 3, it must be a text that is not empty"),
        ("data.references=[]", r"data.references is \[\], it must be a text .*, or null"),
        ("data.heldout=c", "data.heldout is 'c', it must be {name: folder, ...}"),
        ("optimizer.schedule=abc", "optimizer.schedule is 'abc', it must be a section of keys"),
        ("logger.csv=3", "logger is {.*'csv': 3.*}, it must be {name: section, ...}"),
        ("model.architecture=3", "model.architecture is 3, it must be a section of keys, or null"),
        ("data.check=deep", "data.check is 'deep', it must be one of"),
        ("trainer.devices=0", r"^trainer \(lightning.Trainer\): `Trainer\(devices=0\)`"),
        ("max_tokens=1e6", "max_tokens is 1000000.0, it must be .*, as in 1_000_000$"),
        ("max_tokens=100K", "max_tokens is '100K', it must be a whole number of at least 1"),
        ("seed=null", "seed is null, it must be a whole number from 0 to 4294967295"),
        ("seed=-1", "seed is -1, it must be a whole number"),
        ("seed=abc", "seed is 'abc', it must be a whole number"),
        ("selection_start=-1", "selection_start is -1, it must be a whole number of at least 0"),
        ("data.heldout_windows=0", "data.heldout_windows is 0, it must be"),
        ("data.micro_batch_size=0", "data.micro_batch_size is 0, it must be"),
        ("data.batch_size=0", "data.batch_size is 0, it must be"),
        ("data.batch_size=16.0", "data.batch_size is 16.0, it must be a whole number"),
        ("data.num_workers=-1", "data.num_workers is -1, it must be"),
        ("optimizer.adamw.lr=-1", "adamw.lr is -1, it must be a number of at least 0"),
        ("optimizer.adamw.lr=fast", "adamw.lr is 'fast', it must be a number of at least 0"),
        ("optimizer.adamw.betas=[0.9]", r"betas is \[0.9\], it must be a list of 2, each a number"),
        ("optimizer.gradient_clip=0", "gradient_clip is 0, it must be a number above 0, or null"),
        ("optimizer.schedule.warmup_fraction=2000", r"warmup_fraction is 2000, .* in \[0, 1\]"),
        ("model.init_from=''", "model.init_from is '', it must be a text that is not empty"),
        ("callbacks.checkpoints.keep=0", "checkpoints.keep is 0, it must be"),
        ("callbacks.metrics.every_steps=0", "metrics.every_steps is 0, it must be"),
        ("callbacks.mask_overlap.num_windows=2.5", "mask_overlap.num_windows is 2.5, it must be"),
        ("trainer.precision=16-mixed", "trainer.precision is '16-mixed', it must be one of"),
        ("resume=maybe", "resume is 'maybe', it must be one of"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, text_corpus, word, message):
    with pytest.raises(UserError, match=message) as raised:
        train(compose_train(tmp_path / "run", text_corpus.folder, word))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_gpu_where_there_is_none_is_one_sentence(tmp_path, text_corpus, monkeypatch):
    for kind in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    with pytest.raises(UserError, match="accelerator is 'gpu', and PyTorch finds no") as raised:
        train(compose_train(tmp_path / "run", tmp_path / "no", "trainer.accelerator=gpu"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_lightnings_arguments_from_the_environment_are_refused_too(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_DEVICES", "7")  # a key of ours, which the configuration gives
    check_train(settings())
    monkeypatch.setenv("PL_TRAINER_OVERFIT_BATCHES", "2")
    with pytest.raises(UserError, match="overfit_batches is given, as PL_TRAINER_OVERFIT_BATCHES"):
        check_train(settings())


class Stop(Callback):
    """What early stopping does, and a time limit."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.global_step >= 3


def test_a_run_that_ends_before_its_tokens_has_no_model_and_goes_on(
    tmp_path: Path, text_corpus, monkeypatch
):
    config = compose_train(tmp_path / "run", text_corpus.folder)
    with monkeypatch.context() as patched:
        patched.setattr(building, "StepProgress", Stop)
        with pytest.raises(UserError, match="ended at step 3 of 12, so no model is written"):
            train(config)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "lineage.json").exists()
    assert (train(config) / "slm.json").exists()
