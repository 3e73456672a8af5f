"""Training from Python: the same settings, records and runs as from the command line."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

import run_helpers
from slm.cli import conf_folder
from slm.errors import UserError
from slm.selection import Excess, Random
from slm.store.files import read_json
from slm.train.command import train
from slm.train.compose import GROUPS, composed, usual_choices
from slm.train.curves import Run
from slm.train.keys import FOLDERS
from train_helpers import compose_train

CHOICES = {
    group: sorted(p.stem for p in (conf_folder() / group).glob("*.yaml")) for group in GROUPS
}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def by_hydra(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("train", overrides=["out=o", "run_dir=o", "max_tokens=9", *overrides])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def by_us(**groups: Any) -> dict[str, Any]:
    root = {"out": "o", "run_dir": "o", "max_tokens": 9, "seed": 0, "modules": [], "resume": "auto"}
    root |= {"selection_start": 0, "online_reference": None, "stages": None}
    return composed({**root, **usual_choices(), **groups})


@pytest.mark.parametrize("number", range(max(map(len, CHOICES.values()))))
def test_a_group_is_what_hydra_composes(number):
    words = {group: names[number % len(names)] for group, names in CHOICES.items()}
    overrides = [f"{group}={word}" for group, word in words.items()] + ["data.corpus=c"]
    given: dict[str, Any] = {**words, "data": {"defaults": [words["data"]], "corpus": "c"}}
    if words["callbacks"] == "dynamics":
        overrides.append("callbacks.dynamics.corpus=h")
        given["callbacks"] = {"defaults": ["dynamics"], "dynamics": {"corpus": "h"}}
    if words["model"] == "pretrained":
        overrides.append("model.init_from=m")
        given["model"] = {"defaults": ["pretrained"], "init_from": "m"}
    assert by_us(**given) == by_hydra(*overrides)


def test_a_dict_is_laid_over_the_usual_choice():
    given = by_us(data={"corpus": "c"}, optimizer={"adamw": {"lr": 0.5}}, model={"init_from": "m"})
    words = ["data.corpus=c", "optimizer.adamw.lr=0.5", "model.init_from=m"]
    assert given == by_hydra(*words)


def test_the_arguments_are_the_keys_of_the_command_with_their_defaults():
    root: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "train.yaml"))
    usual = {
        k: v for entry in root.pop("defaults") if isinstance(entry, dict) for k, v in entry.items()
    }
    del root["hydra"], root["run_dir"], usual["experiment"]  # of the command line alone
    data: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "data" / "shards.yaml"))
    # In Python it stands first, None where there is a mixture.
    expected = root | usual | {name: data[name] for name in FOLDERS} | {"corpus": "???"}
    found = {
        name: "???" if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in inspect.signature(train).parameters.items()
    }
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} == expected


@pytest.fixture
def references(tmp_path, text_corpus, make_references) -> Any:
    scores = [np.full(shard.num_tokens, -2.0) for shard in text_corpus.shards]
    return make_references(tmp_path / "references", text_corpus, scores)


def in_python(out: Path, corpus: Any, **settings: Any) -> Run:
    """The run of `compose_train` with another budget."""
    given: dict[str, Any] = {
        "heldout": {"held": corpus},
        "data": {"heldout_windows": 6, "batch_size": 8, "micro_batch_size": 4},
        "model": {"architecture": TINY | {"attention_dropout": 0.2}},
        "optimizer": {"adamw": {"lr": 0.01}},
        "callbacks": {
            "heldout": {"every_tokens": 384},
            "checkpoints": {"every_tokens": 256, "best_of": "held"},
            "metrics": {"every_steps": 1},
        },
        "logger": "csv",
    }
    return train(corpus, out, 512, **given | settings)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Excess(0.5), ["selection=excess", "selection.select_ratio=0.5"]),
        (Random(0.5, seed=1), ["selection=random", "selection.select_ratio=0.5", "seed=1"]),
    ],
)
def test_a_run_of_either_way_goes_on_in_the_other(tmp_path, text_corpus, references, rule, words):
    seed = 1 if isinstance(rule, Random) else 0
    given = {"references": references.folder, "selection": rule, "seed": seed}
    mine = in_python(tmp_path / "python", text_corpus.folder, **given)
    words = [*words, "max_tokens=512", f"data.references='{references.folder}'"]
    run_helpers.train(compose_train(tmp_path / "words", text_corpus.folder, *words))
    theirs = Run(tmp_path / "words")
    assert read_json(mine.folder / "run.json") == read_json(theirs.folder / "run.json")
    assert mine.lineage["selection"] == theirs.lineage["selection"]
    assert (mine.model / "model.safetensors").read_bytes() == (
        theirs.model / "model.safetensors"
    ).read_bytes()
    # Neither refuses what the other made.
    run_helpers.train(compose_train(mine.folder, text_corpus.folder, *words))
    in_python(theirs.folder, text_corpus.folder, **given)
    with pytest.raises(UserError, match="holds another run: selection.select_ratio is 0.5 in"):
        in_python(
            theirs.folder,
            text_corpus.folder,
            **given | {"selection": replace(rule, select_ratio=0.25)},
        )


class Count(Callback):
    steps = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps = trainer.global_step


def test_objects_stand_beside_what_conf_has_and_the_run_is_read_back(tmp_path, text_corpus):
    counter = Count()
    run = in_python(
        tmp_path / "run",
        text_corpus.folder,
        selection="all",
        callbacks={"count": counter, "metrics": {"every_steps": 2}},
        logger={"defaults": ["csv"], "other": CSVLogger(str(tmp_path / "logs"))},
    )
    assert counter.steps == 4
    train_curve = run.curves["train"].dropna(subset="train/loss")  # mask_overlap has rows too
    assert list(train_curve["step"]) == [2, 4]
    held = run.curves["heldout"]["heldout/held/loss"]
    assert run.metrics["heldout/held/loss"] == held.iloc[-1]
    assert run.metrics["slm/kept_frac"] == 1.0
    assert run.lineage["tokens_seen"] == 512
    assert (run.model / "slm.json").exists() and Path(run) == run.folder
    assert list((tmp_path / "logs").rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"selection": "exces"},
            r"^selection is 'exces', conf/selection has all, entropy, excess, ",
        ),
        ({"selection": 0.6}, r"^selection is 0.6, it must be a section of keys$"),
        ({"data": {"corpus": "c"}}, r"^data.corpus is given: corpus is an argument of its own$"),
        ({"model": {"architecture": TINY, "init_from": "m"}}, "model.architecture is given with"),
        ({"callbacks": "dynamics"}, "^callbacks.dynamics.corpus must be given"),
        ({"max_token": 3}, "max_token is given, and nothing reads it, did you mean max_tokens?"),
        ({"optimizer": {"lr": 3}}, "optimizer.lr is given, and nothing reads it"),
        (
            {"selection": "all", "callbacks": {"checkpoints": {"kep": 3}}},
            "^callbacks.checkpoints.kep is given, and nothing reads it, did you mean .*keep?",
        ),
        ({"trainer": {"strategy": "fsdp"}}, "^trainer.strategy is 'fsdp', which is FSDP1"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, text_corpus, settings, message):
    with pytest.raises(UserError, match=message):
        in_python(tmp_path / "run", text_corpus.folder, **settings)
