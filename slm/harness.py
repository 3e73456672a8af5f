"""`python -m slm.harness`, which `slm harness` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command, imports
from slm.command_keys import HARNESS


@command("harness", partial(check, table=HARNESS))
def main(**settings: Any) -> None:
    with imports():
        from slm.evaluate.harness import run
    run(**settings)


if __name__ == "__main__":
    main()
