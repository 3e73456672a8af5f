"""Which tests there are, and where they run; what they share is in common.py."""

import atexit
import gc
import os
import re
import sys
from importlib import import_module
from itertools import groupby
from typing import Any

import pytest

WHOLE_RUNS = """
test_build.py test_cli.py test_command.py test_compose.py test_conf.py test_corpus.py test_costs.py
test_encoder.py test_extend.py test_figures.py test_harness.py test_implementations.py test_keys.py
test_older_build.py test_page.py test_pipeline.py
test_plots.py test_scorer.py test_served.py test_sweep.py test_transformers.py test_trl.py
test_workers.py
""".split()  # files whose tests together take seconds, most since they train or draw


def pytest_configure(config: pytest.Config) -> None:
    """What only hands tests to workers does without the imports."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        import_module("environment")
        config.pluginmanager.register(import_module("common"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_newgateway(gateway: Any) -> None:
    """Workers import at the same time: each is asked who it is before the next is started."""
    from execnet.gateway import RInfo

    names = {"executable": sys.executable, "platform": sys.platform, "cwd": os.getcwd()}
    gateway._cache_rinfo = RInfo(names | {"version_info": sys.version_info})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    for item in items:  # what an interpreter or a compiler has no GPU for takes seconds
        on_a_cpu = not torch.cuda.is_available() and re.search("triton|compile", item.nodeid)
        if item.path.name in WHOLE_RUNS or on_a_cpu:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        items[:] = dealt(items)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA: see `make gpu-check`")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def dealt(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files with slow tests first on either half of the list, which is what each of two workers
    begins with: at the end one is not left with a long test while the other has none.

    Before all, one after the other: what inductor compiles. Its headers are compiled once.
    """
    files = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
    files.sort(key=lambda file: all(item.get_closest_marker("slow") is None for item in file))
    halves: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
    for file in files:
        min(halves, key=len).extend(file)
    return sorted([*halves[0], *halves[1]], key=lambda item: "inductor" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that looked at all of it would take a second."""
    gc.freeze()
    gc.enable()  # environment.py has turned it off
    atexit.register(gc.unfreeze)
