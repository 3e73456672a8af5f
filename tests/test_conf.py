"""Every root composes; every experiment and every choice of every group takes an optimizer step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf

from run_helpers import TINY_MODEL, composed, train
from slm.cli import COMMANDS, conf_folder

ROOTS = sorted(path.stem for path in conf_folder().glob("*.yaml") if path.stem != "base")
GROUPS = {
    group: sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
    for group in ("model", "selection", "optimizer", "callbacks", "logger", "experiment")
}


@pytest.mark.parametrize("root", ROOTS)
def test_root_belongs_to_a_command_and_composes(root):
    assert root in COMMANDS
    assert "hydra" not in composed(root)


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
        *TINY_MODEL,
        *overrides,
    )
    return train(config)


@pytest.fixture
def references(tmp_path, text_corpus, make_references) -> Any:
    scores = [np.full(shard.num_tokens, -2.0) for shard in text_corpus.shards]
    entropies = [np.full(shard.num_tokens, 1.5) for shard in text_corpus.shards]
    return make_references(tmp_path / "references", text_corpus, scores, entropies)


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, choice) for group, choices in GROUPS.items() for choice in choices],
)
def test_every_choice_takes_a_step(tmp_path, text_corpus, references, group, choice):
    words = [f"{group}={choice}"]
    if group != "logger":
        words.append("logger=csv")
    if choice == "rho1_1b":  # its model is on a hub, its trainer wants a GPU
        words += ["model.init_from=null", "trainer=default"]
    if choice == "dynamics":
        words += [f"callbacks.dynamics.corpus='{text_corpus.folder}'"]
    folder = one_step(tmp_path, text_corpus, references, *words)
    assert (folder / "slm.json").exists()


def test_gpu_trainer_differs_from_default_in_three_values():
    default = OmegaConf.to_container(composed("train", "out=x", "max_tokens=1").trainer)
    gpu = OmegaConf.to_container(composed("train", "out=x", "max_tokens=1", "trainer=gpu").trainer)
    assert isinstance(default, dict) and isinstance(gpu, dict)
    changed = {key: gpu[key] for key in gpu if gpu[key] != default[key]}
    assert changed == {"accelerator": "gpu", "devices": "auto", "precision": "bf16-mixed"}


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
