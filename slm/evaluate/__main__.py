"""`python -m slm.evaluate`, which `slm evaluate` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import EVALUATE
from slm.store.inputs import check_command


@command("evaluate", partial(check_command, table=EVALUATE))
def main(**settings: Any) -> None:
    with imports():
        from slm.evaluate.command import run
    run(**settings)


if __name__ == "__main__":
    main()
