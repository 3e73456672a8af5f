"""Selective language modeling: prepare, train, score, evaluate."""

import os
import sys

__version__ = "0.1.0"


def leave_current_folder() -> None:
    """Under `python -m slm.x`: a queue.py or tokenizers.py of the current folder must not run.

    -m puts that folder first on the path, and argv[0] is "-m" until it has found its module. What
    is started from here (ranks, workers, jobs of a launcher) gets the same by the environment.
    """
    names = [word for word in sys.orig_argv if word.startswith("slm.")]
    if sys.argv[:1] == ["-m"] and names and not sys.flags.safe_path:
        sys.path.remove(os.getcwd())
        os.environ["PYTHONSAFEPATH"] = "1"


leave_current_folder()
