"""`python -m slm.import`, which `slm import` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command, imports
from slm.command_keys import IMPORT


@command("import", partial(check, table=IMPORT))
def main(**settings: Any) -> None:
    with imports():
        from slm.prepare.imports.command import run
    run(**settings)


if __name__ == "__main__":
    main()
