"""`python -m slm.score`, which `slm score` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import SCORE
from slm.store.inputs import check_command


@command("score", partial(check_command, table=SCORE))
def main(**settings: Any) -> None:
    with imports():
        from slm.score.command import run
    run(**settings)


if __name__ == "__main__":
    main()
