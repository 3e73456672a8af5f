"""`python -m slm.dynamics`, which `slm dynamics` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import DYNAMICS
from slm.store.inputs import check_command


@command("dynamics", partial(check_command, table=DYNAMICS))
def main(**settings: Any) -> None:
    with imports():
        from slm.dynamics.command import run
    run(**settings)


if __name__ == "__main__":
    main()
