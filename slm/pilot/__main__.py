"""`python -m slm.pilot`, which `slm pilot` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import PILOT
from slm.store.inputs import check_command


@command("pilot", partial(check_command, table=PILOT))
def main(**settings: Any) -> None:
    with imports():
        from slm.pilot.command import run
    run(**settings)


if __name__ == "__main__":
    main()
