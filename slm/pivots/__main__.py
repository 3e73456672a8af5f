"""`python -m slm.pivots`, which `slm pivots` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import PIVOTS
from slm.store.inputs import check_command


@command("pivots", partial(check_command, table=PIVOTS))
def main(**settings: Any) -> None:
    with imports():
        from slm.pivots.command import run
    run(**settings)


if __name__ == "__main__":
    main()
