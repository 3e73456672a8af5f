"""`python -m slm.harness`, which `slm harness` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import HARNESS
from slm.store.inputs import check_command


@command("harness", partial(check_command, table=HARNESS))
def main(**settings: Any) -> None:
    with imports():
        from slm.evaluate.harness import run
    run(**settings)


if __name__ == "__main__":
    main()
