"""`python -m slm.report`, which `slm report` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import REPORT
from slm.store.inputs import check_command


@command("report", partial(check_command, table=REPORT))
def main(**settings: Any) -> None:
    with imports():
        from slm.report.command import run
    run(**settings)


if __name__ == "__main__":
    main()
