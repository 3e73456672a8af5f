"""`python -m slm.evaluate`, which `slm evaluate` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command, imports
from slm.command_keys import EVALUATE


@command("evaluate", partial(check, table=EVALUATE))
def main(**settings: Any) -> None:
    with imports():
        from slm.evaluate.command import run
    run(**settings)


if __name__ == "__main__":
    main()
