"""What configurations compute: the resolvers `${slm.job_name:...}` and their like."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

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


def sweep_group() -> str | None:
    """Name for what belongs to one sweep, from its folder; None in a single run."""
    config: Any = HydraConfig.instance().cfg
    if config is None or config.hydra.mode != RunMode.MULTIRUN:
        return None
    return "-".join(Path(config.hydra.sweep.dir).resolve().parts[-2:]).strip("/-")


OmegaConf.register_new_resolver("slm.command_line", command_line, use_cache=True, replace=True)
OmegaConf.register_new_resolver("slm.job_name", job_name, replace=True)
OmegaConf.register_new_resolver("slm.sweep_group", sweep_group, replace=True)
