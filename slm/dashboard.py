"""`python -m slm.dashboard`, which `slm dashboard` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command, imports
from slm.command_keys import DASHBOARD


@command("dashboard", partial(check, table=DASHBOARD))
def main(**settings: Any) -> None:
    with imports():
        from slm.report.workspace import run
    run(**settings)


if __name__ == "__main__":
    main()
