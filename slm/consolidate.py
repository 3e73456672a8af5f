"""`python -m slm.consolidate`, which `slm consolidate` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command, imports
from slm.command_keys import CONSOLIDATE


@command("consolidate", partial(check, table=CONSOLIDATE))
def main(**settings: Any) -> None:
    with imports():
        from slm.train.consolidate import consolidate_checkpoint
    consolidate_checkpoint(**settings)


if __name__ == "__main__":
    main()
