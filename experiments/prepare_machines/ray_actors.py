"""`slm prepare` on a pool of Ray's actors, wherever in the cluster they run: one corpus together.

    python ray_actors.py IN OUT TOKENIZER [ACTORS]          JSON lines in IN; OUT is the corpus

Each actor runs the whole command on one folder, which all machines see. An actor that is lost is
started again by Ray (max_restarts, max_task_retries) and goes on with what nobody has done.
"""

import sys
from pathlib import Path
from typing import Any

import ray  # type: ignore[import-not-found]
from ray.util import ActorPool  # type: ignore[import-not-found]


@ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2)
class Preparer:
    def prepare(self, settings: dict[str, Any]) -> str:
        import slm  # in the actor

        return slm.prepare(**settings, num_proc=1).report["train"]["fingerprint"]


def main(given: str, out: str, tokenizer: str, actors: str = "2") -> None:
    count = int(actors)
    settings = {
        "sources": [{"path": str(Path(given).absolute()), "name": "given"}],
        "out": str(Path(out).absolute()),
        "tokenizer": {"path": tokenizer},
    }
    ray.init(num_cpus=count, include_dashboard=False)
    made = [Preparer.remote() for _ in range(count)]  # type: ignore[attr-defined]
    pool = ActorPool(made)
    found = {*pool.map(lambda actor, task: actor.prepare.remote(task), [settings] * count)}
    ray.shutdown()
    (fingerprint,) = found
    print(fingerprint)


if __name__ == "__main__":
    main(*sys.argv[1:])
