"""Which tests there are, and where they run; what they share is in common.py."""

import atexit
import gc
from importlib import import_module

import pytest

WHOLE_RUNS = """
test_build.py test_cli.py test_command.py test_compose.py test_conf.py test_figures.py
test_older_build.py test_page.py test_plots.py test_served.py test_sweep.py test_transformers.py
test_trl.py test_workers.py
""".split()  # files whose tests train models or draw pictures: seconds each, minutes together


def pytest_configure(config: pytest.Config) -> None:
    """What only hands tests to workers does without the imports."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        import_module("environment")
        config.pluginmanager.register(import_module("common"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        interpreted = "triton" in item.nodeid and not torch.cuda.is_available()
        if item.path.name in WHOLE_RUNS or interpreted:
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA: see `make gpu-check`")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that looked at all of it would take a second."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
