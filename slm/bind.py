"""`python -m slm.bind`, which `slm bind` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import BIND
from slm.store.inputs import check_command


@command("bind", partial(check_command, table=BIND))
def main(**settings: Any) -> None:
    with imports():
        from slm.score.bind import run
    run(**settings)


if __name__ == "__main__":
    main()
