"""`python -m slm.needle`, which `slm needle` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import NEEDLE
from slm.store.inputs import check_command


@command("needle", partial(check_command, table=NEEDLE))
def main(**settings: Any) -> None:
    with imports():
        from slm.evaluate.needle import run
    run(**settings)


if __name__ == "__main__":
    main()
