"""`python -m slm.dynamics`, which `slm dynamics` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command, imports
from slm.command_keys import DYNAMICS


@command("dynamics", partial(check, table=DYNAMICS))
def main(**settings: Any) -> None:
    with imports():
        from slm.dynamics.command import run
    run(**settings)


if __name__ == "__main__":
    main()
