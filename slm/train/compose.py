"""The settings of a run, from what Python is given: laid over the files of conf/, as Hydra does it.

A group (data, model, selection, optimizer, trainer, callbacks, logger) is a word or a dict:

    "llama_10m"                                       conf/model/llama_10m.yaml
    {"init_from": folder}                             over the choice that conf/train.yaml makes
    {"defaults": ["llama_10m"], "init_from": folder}  over that file, in the words of conf/ itself
    {"defaults": [], ...}                             over nothing: all of it is given

A value may refer to another key, as in conf/: "${seed}".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

import slm.hydra_names  # noqa: F401  # the resolvers that conf/ names
from slm.cli import conf_folder, root_file
from slm.errors import UserError
from slm.selection.rule import Selection

Group = str | Mapping[str, Any]
OBJECTS = (Callback, Logger)  # that Python gives, in place of a dict
GROUPS = ("data", "model", "selection", "optimizer", "trainer", "callbacks", "logger")


def composed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Root keys and groups -> plain values of every key."""
    usual = usual_choices()
    rule = settings["selection"]
    settings = {**settings, "selection": node_of(rule) if isinstance(rule, Selection) else rule}
    config = OmegaConf.create({k: v for k, v in settings.items() if k not in GROUPS})
    for name in GROUPS:
        config[name] = laid(name, settings[name], [usual[name]])
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{', '.join(missing)} must be given")
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def usual_choices() -> dict[str, str]:
    """Of conf/train.yaml, for each group."""
    root: Any = OmegaConf.load(root_file("train"))
    entries = [entry for entry in root.defaults if isinstance(entry, DictConfig)]
    return {str(k): v for entry in entries for k, v in entry.items() if k in GROUPS}


def laid(group: str, given: Any, usual: Sequence[str] = ()) -> Any:
    """A group over the files that its `defaults` name; without `defaults`, over the usual ones."""
    if isinstance(given, str):
        given = {"defaults": [given]}
    if not isinstance(given, Mapping):
        return given  # the check of the settings says what it must be
    own = {name: value for name, value in given.items() if not isinstance(value, OBJECTS)}
    names = own.pop("defaults", usual)
    return OmegaConf.merge(*(laid(group, read_choice(group, name)) for name in names), own)


def read_choice(group: str, name: str) -> dict[str, Any]:
    path = conf_folder() / group / f"{name}.yaml"
    if not path.exists():
        known = sorted(other.stem for other in path.parent.glob("*.yaml"))
        raise UserError(f"{group} is {name!r}, conf/{group} has {', '.join(known)}")
    return OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[return-value]


def objects_in(group: Any) -> dict[str, Any]:
    pairs = group.items() if isinstance(group, Mapping) else ()
    return {name: value for name, value in pairs if isinstance(value, OBJECTS)}


def node_of(rule: Selection) -> dict[str, Any]:
    """A rule as a configuration names it: its class and its fields, over nothing."""
    kind = type(rule)
    if not dataclasses.is_dataclass(rule):
        raise UserError(f"selection is a {kind.__name__}, and that must be a dataclass")
    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if f.init}
    return {"defaults": [], "_target_": f"{kind.__module__}.{kind.__qualname__}", **fields}
