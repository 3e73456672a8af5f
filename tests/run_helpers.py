"""Run folders made by hand, with losses that are known; the words of a model of no size."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from slm.cli import conf_folder, plain_settings

BUDGET = 400
TINY_MODEL = [
    "model.architecture.hidden_size=16",
    "model.architecture.intermediate_size=32",
    "model.architecture.num_hidden_layers=1",
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=2",
]


def with_tiny_model(words: list[str]) -> list[str]:
    """A command line; of `slm train` with a new model, one whose model has no size."""
    is_new = words[1:3] == ["-m", "slm.train"] and "model.init_from" not in " ".join(words)
    return [*words, *(TINY_MODEL if is_new else [])]


@cache
def chosen(root: str, choices: tuple[str, ...]) -> Any:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(root, overrides=list(choices))


def composed(root: str, *words: str) -> Any:
    """What Hydra composes from a command line: a group's choices once, over them the keys."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    is_choice = [(conf_folder() / word.key_or_group).is_dir() for word in parsed]
    choices = tuple(word for word, choice in zip(words, is_choice, strict=True) if choice)
    config = copy.deepcopy(chosen(root, choices))
    for word, choice in zip(parsed, is_choice, strict=True):
        if not choice:
            OmegaConf.update(config, word.key_or_group, word.value(), force_add=word.is_add())
    with open_dict(config):
        config.pop("task", None)  # of an array: the command's alone
    return config


def train(config: Any) -> Path:
    """What `slm train` does with a composed configuration; returns the model folder."""
    from slm.train.command import arguments, train  # here: others of this file import no Lightning

    return train(**arguments(plain_settings(config))).model


STRAYS = ("queue", "random", "tokenizers", "datasets", "numpy", "torch", "hydra")


def leave_strays(folder: Path) -> None:
    """Files with the names of modules that every command imports; importing one ends it."""
    for name in STRAYS:
        (folder / f"{name}.py").write_text("raise SystemExit('a stray module was imported')")


def make_run(
    folder: Path,
    selection: str = "Excess",
    ratio: float | None = 0.5,
    seed: int = 0,
    final: float = 3.0,
    identity: dict[str, Any] | None = None,
    **record: Any,
) -> Path:
    """A finished run: loss on `a` falls from 9 through 5 to `final`, on `b` it is twice that."""
    rule: dict[str, Any] = {"_target_": f"slm.selection.{selection}"}
    if ratio is not None:
        rule |= {"select_ratio": ratio, "scope": "batch"}
    if selection == "Random":
        rule["seed"] = seed
    lineage = {
        "selection": rule,
        "seed": seed,
        "corpus_fingerprint": "c0ffee",
        "tokens_seen": BUDGET,
        "tokens_selected": round(BUDGET * (ratio or 1)),
        "needs_references": True,
        "references": [],
        "online_reference": None,
        "heldout": {},
        "train_seconds": None,
        "train_flops": None,
    } | record
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "slm.json").write_text(json.dumps({"lineage": lineage}))
    flat = {f"selection.{key}": value for key, value in rule.items()}
    run = {"seed": seed, "corpus": lineage["corpus_fingerprint"], **flat} | (identity or {})
    (folder / "run.json").write_text(json.dumps(run))
    rows = [
        f"{i},{seen},{loss},1,{2 * loss},1"
        for i, (seen, loss) in enumerate([(0, 9.0), (200, 5.0), (BUDGET, final)])
    ]
    header = "step,tokens_seen,heldout/a/loss,heldout/a/bits_per_byte,heldout/b/loss,"
    header += "heldout/b/bits_per_byte"
    (folder / "heldout.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def compose_report(runs: Any, out: Path, **more: Any) -> Any:
    config = composed("report", f"out='{out}'")
    config.runs = [str(run) for run in runs] if isinstance(runs, list) else str(runs)
    for key, value in more.items():
        config[key] = value
    return plain_settings(config)
