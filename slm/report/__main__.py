"""`python -m slm.report`, which `slm report` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command
from slm.command_keys import REPORT


@command("report", partial(check, table=REPORT))
def main(**settings: Any) -> None:
    from slm.report.command import run

    run(**settings)


if __name__ == "__main__":
    main()
