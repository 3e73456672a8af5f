"""Selective language modeling, from Python: what is named here is public.

    from slm import prepare, import_corpus, score, train, evaluate, dynamics, report, pilot, pivots
    from slm import Corpus, References, Windows, SelectiveLM

Each is imported when it is first asked for. A stage is a function and the folder of its modules
(`annotate`, `import_corpus`, `export_corpus`, `bind_scores` and `consolidate_checkpoint` are
functions alone: the commands `slm annotate`, `import`, `export`, `bind` and `consolidate`).
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from slm.version import __version__

if TYPE_CHECKING:
    from slm.dynamics.command import dynamics
    from slm.evaluate.command import evaluate
    from slm.model.build import SelectiveLM
    from slm.pilot.command import pilot
    from slm.pivots.command import pivots
    from slm.prepare.command import prepare
    from slm.prepare.imports.command import import_corpus
    from slm.quality.annotate import annotate
    from slm.quality.command import quality
    from slm.report.command import report
    from slm.score.bind import bind_scores
    from slm.score.command import score
    from slm.store.shards import Corpus, References
    from slm.store.windows import Windows
    from slm.train.command import train
    from slm.train.consolidate import consolidate_checkpoint
    from slm.train.export import export_corpus

HOMES = {
    "annotate": "slm.quality.annotate",
    "Corpus": "slm.store.shards",
    "References": "slm.store.shards",
    "Windows": "slm.store.windows",
    "SelectiveLM": "slm.model.build",
    "import_corpus": "slm.prepare.imports.command",
    "bind_scores": "slm.score.bind",
    "consolidate_checkpoint": "slm.train.consolidate",
    "export_corpus": "slm.train.export",
}
__all__ = [
    "Corpus",
    "References",
    "SelectiveLM",
    "Windows",
    "__version__",
    "annotate",
    "bind_scores",
    "consolidate_checkpoint",
    "dynamics",
    "evaluate",
    "export_corpus",
    "import_corpus",
    "pilot",
    "pivots",
    "prepare",
    "quality",
    "report",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    if name in __all__:
        return import_module(f"slm.{name}")
    raise AttributeError(f"module 'slm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
