"""Every root composes; every experiment and every choice of every group takes an optimizer step."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf

from model_helpers import small_llama
from run_helpers import TINY_MODEL, composed, train
from slm.cli import COMMANDS, conf_folder
from slm.train.settings import FROM_SCRATCH

ROOTS = sorted(
    path.stem for path in conf_folder().glob("*.yaml") if path.stem not in ("base", "array")
)
GROUPS = {
    group: sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
    for group in ("model", "selection", "optimizer", "callbacks", "logger", "experiment")
}
GROUPS["experiment"].remove("phi4")  # two stages over eleven corpora: tests/train/test_stages.py
PRETRAINED = ("continue_small", "continue_1b", "sft")


@pytest.mark.parametrize("root", ROOTS)
def test_root_belongs_to_a_command_and_composes(root):
    assert root in COMMANDS
    assert "hydra" not in composed(root)


SAID = """
import json, logging, logging.config, sys
logging.config.dictConfig(json.loads(sys.argv[1]))
logging.getLogger("slm.prepare").info("ours")
logging.getLogger("botocore.credentials").info("a connection")
logging.getLogger("botocore").warning("theirs")
"""


def test_libraries_say_nothing_but_warnings():
    root = OmegaConf.load(conf_folder() / "base.yaml")
    logging: Any = OmegaConf.to_container(root.hydra.job_logging)
    del logging["handlers"]["file"]  # half of Hydra's own
    words = [sys.executable, "-c", SAID, json.dumps(logging)]
    assert subprocess.run(words, capture_output=True, text=True).stderr == "ours\ntheirs\n"


def one_step(tmp_path: Path, corpus: Any, references: Any, *overrides: str) -> Path:
    config = composed(
        "train",
        f"out='{tmp_path / 'run'}'",
        f"run_dir='{tmp_path / 'run'}'",
        f"data.corpus='{corpus.folder}'",
        f"data.references='{references.folder}'",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.num_workers=0",
        "max_tokens=64",
        *overrides,
    )
    return train(config)


def pretrained(folder: Path, corpus: Any) -> str:
    """A model folder that others might have written."""
    shutil.copytree(corpus.folder / "tokenizer", folder)
    small_llama(corpus.vocab_size).save_pretrained(folder)
    return f"model.init_from='{folder}'"


@pytest.fixture
def references(tmp_path, text_corpus, make_references) -> Any:
    scores = [np.full(shard.num_tokens, -2.0) for shard in text_corpus.shards]
    entropies = [np.full(shard.num_tokens, 1.5) for shard in text_corpus.shards]
    more = {"context": 8, "stride": 4}  # for long_gain; nothing else minds
    return make_references(tmp_path / "references", text_corpus, scores, entropies, **more)


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, choice) for group, choices in GROUPS.items() for choice in choices],
)
def test_every_choice_takes_a_step(tmp_path, text_corpus, references, caplog, group, choice):
    words = [f"{group}={choice}"]
    if group != "logger":
        words.append("logger=csv")
    if choice == "rho1_1b":  # its model is on a hub
        words += ["model=llama_600k", "model.init_from=null"]
    if group == "experiment":
        words += ["trainer=default"]  # some want a GPU
    if choice == "forget":
        folder = references.folder
        words += [f"data.references=['{folder}','{folder}']", "data.combine=domain"]
    if choice == "dynamics":
        words += [f"callbacks.dynamics.corpus='{text_corpus.folder}'"]
    loads = choice in (*PRETRAINED, "pretrained")
    words += [pretrained(tmp_path / "base", text_corpus)] if loads else TINY_MODEL
    folder = one_step(tmp_path, text_corpus, references, *words)
    assert (folder / "slm.json").exists()
    # Weights from elsewhere, and the rate of those that are new.
    assert ("is a rate for new weights" in caplog.text) == (choice == "pretrained")


def test_gpu_trainer_differs_from_default_in_three_values():
    default = OmegaConf.to_container(composed("train", "out=x", "max_tokens=1").trainer)
    gpu = OmegaConf.to_container(composed("train", "out=x", "max_tokens=1", "trainer=gpu").trainer)
    assert isinstance(default, dict) and isinstance(gpu, dict)
    changed = {key: gpu[key] for key in gpu if gpu[key] != default[key]}
    assert changed == {"accelerator": "gpu", "devices": "auto", "precision": "bf16-mixed"}


@pytest.mark.parametrize("choice", [*PRETRAINED, "rho1_1b"])
@pytest.mark.parametrize("optimizer", GROUPS["optimizer"])
def test_a_recipe_has_a_rate_for_pretrained_weights_beside_every_optimizer(choice, optimizer):
    usual = composed("train", f"optimizer={optimizer}")
    config = composed("train", f"optimizer={optimizer}", f"experiment={choice}")
    assert config.optimizer.adamw.lr < FROM_SCRATCH == usual.optimizer.adamw.lr
    assert config.optimizer.schedule == usual.optimizer.schedule
    assert OmegaConf.is_missing(config.model, "init_from") == (choice != "rho1_1b")


def test_a_recipe_goes_with_the_sweep_of_k():
    words = ["experiment=[sweep_k,continue_small]", "model.init_from=x"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("train", overrides=words, return_hydra_config=True)
    assert config.hydra.mode == RunMode.MULTIRUN and config.optimizer.adamw.lr == 5e-5


def test_sweep_k_has_both_rules_at_every_ratio_and_all_tokens():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("train", overrides=["experiment=sweep_k"], return_hydra_config=True)
    assert config.hydra.mode == RunMode.MULTIRUN  # `-m` is not needed
    lists = {key: value.split(",") for key, value in config.hydra.sweeper.params.items()}
    assert lists == {
        "selection": ["excess", "random"],
        "selection.select_ratio": ["0.2", "0.4", "0.6", "0.8", "1.0"],
        "seed": ["0", "1", "2"],
    }
