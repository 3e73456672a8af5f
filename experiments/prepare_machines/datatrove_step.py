"""`slm prepare` as a step of datatrove: filters first, then the tasks make one corpus together.

    python datatrove_step.py IN OUT TOKENIZER [TASKS]     JSON lines in IN; OUT/corpus is made

Each task runs the whole command on one folder: units of the input are claimed, so that tasks share
the work whatever their number, and a task that is killed costs one unit. On a cluster the same step
stands in a SlurmPipelineExecutor. The corpus has the bytes that `slm prepare` gives alone.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


class Prepare(PipelineStep):
    """The keys of `slm.prepare`; a task of datatrove is a daemon, which starts no processes."""

    name = "slm prepare"
    type = "tokenizer"

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings | {"num_proc": 1}

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> Iterable[Any]:
        import slm  # in the task

        slm.prepare(**self.settings)
        return ()


def is_long(document: Any) -> bool:
    return len(document.text) > 200


def main(given: str, out: str, tokenizer: str, tasks: str = "2") -> None:
    folder = Path(out)
    spread: Any = {"tasks": int(tasks), "workers": int(tasks), "start_method": "spawn"}
    filtered = LocalPipelineExecutor(
        [
            JsonlReader(given, glob_pattern="*.jsonl"),
            LambdaFilter(is_long),
            JsonlWriter(str(folder / "filtered"), "${rank}.jsonl", compression=None),
        ],
        logging_dir=str(folder / "logs" / "filter"),
        **spread,
    )
    source = {"path": str(folder / "filtered"), "name": "filtered"}
    step = Prepare(sources=[source], out=str(folder / "corpus"), tokenizer={"path": tokenizer})
    prepared = LocalPipelineExecutor(
        [step], logging_dir=str(folder / "logs" / "prepare"), depends=filtered, **spread
    )
    prepared.run()  # runs first what it depends on


if __name__ == "__main__":
    main(*sys.argv[1:])
