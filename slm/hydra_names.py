"""What configurations compute: the resolvers `${slm.job_name:...}` and their like."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from slm.cli import conf_folder
from slm.names import file_name


def command_line() -> list[str]:
    """The words of the command; Hydra copies cached values from a sweep's config to its jobs'."""
    return sys.argv[1:]


def job_name(given: list[str], number: int, *, _root_: DictConfig) -> str:
    """Folder name of a job: the overrides that differ between jobs, `k=0.4,seed=1`.

    Those are the ones that neither the command line nor hydra.sweeper.params fixes. A sweep of one
    job has its number. What can be no folder's name is cut and has a hash.
    """
    params = OmegaConf.select(_root_, "hydra.sweeper.params") or {}
    parser, last = OverridesParser.create(), {}
    for text in [*(f"{key}={value}" for key, value in params.items()), *given]:
        with suppress(HydraException):  # options such as -m are no overrides
            word = parser.parse_override(text)
            last[word.key_or_group] = word
    fixed = {key for key, word in last.items() if not word.is_sweep_override()}
    jobs = parser.parse_overrides(list(_root_.hydra.overrides.task))
    differing = [str(word.input_line) for word in jobs if word.key_or_group not in fixed]
    return file_name(",".join(differing) or str(number))


def sweep_jobs(root: str, given: list[str]) -> dict[str, list[str]]:
    """The jobs that a command line would run, by their folders' names, and their overrides.

    By Hydra's own sweeper; none where the command line is no sweep.
    """
    options = get_args_parser().parse_args(given)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = GlobalHydra.instance().hydra.compose_config(  # type: ignore[union-attr]
            root, options.overrides, RunMode.MULTIRUN, False, validate_sweep_overrides=False
        )
    if not options.multirun and config.hydra.mode != RunMode.MULTIRUN:
        return {}
    params = config.hydra.sweeper.params or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    parsed = OverridesParser.create().parse_overrides(words)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    found = {}
    for number, job in enumerate(jobs):
        hydra = {"sweeper": {"params": params}, "overrides": {"task": job}}
        found[job_name(given, number, _root_=OmegaConf.create({"hydra": hydra}))] = job
    return found


def share(count: int, part: float) -> int:
    """Of a count of tokens: where a stage ends."""
    return round(count * part)


def sweep_group() -> str | None:
    """Name for what belongs to one sweep, from its folder; None in a single run."""
    config: Any = HydraConfig.instance().cfg
    if config is None or config.hydra.mode != RunMode.MULTIRUN:
        return None
    return "-".join(Path(config.hydra.sweep.dir).resolve().parts[-2:]).strip("/-")


OmegaConf.register_new_resolver("slm.command_line", command_line, use_cache=True, replace=True)
OmegaConf.register_new_resolver("slm.job_name", job_name, replace=True)
OmegaConf.register_new_resolver("slm.share", share, replace=True)
OmegaConf.register_new_resolver("slm.sweep_group", sweep_group, replace=True)

# The one there is: Hydra copies it for every look at a group, a second for the help of a command.
ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
