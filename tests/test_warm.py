"""Processes that are forked for the tests are as independent as others."""

import sys
from pathlib import Path

import warm


def test_a_child_that_ends_leaves_the_folders_that_a_library_made_on_import():
    from wandb.sdk.data_types._private import MEDIA_TMP

    warm.run([sys.executable, "-c", "pass"], check=True)
    assert Path(MEDIA_TMP.name).is_dir()
