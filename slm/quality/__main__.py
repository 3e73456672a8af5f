"""`python -m slm.quality`, which `slm quality` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import QUALITY
from slm.store.inputs import check_command


@command("quality", partial(check_command, table=QUALITY))
def main(**settings: Any) -> None:
    with imports():
        from slm.quality.command import run
    run(**settings)


if __name__ == "__main__":
    main()
