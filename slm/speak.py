"""`python -m slm.speak`, which `slm speak` runs."""

from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import SPEAK
from slm.store.inputs import check_command


@command("speak", partial(check_command, table=SPEAK))
def main(**settings: Any) -> None:
    with imports():
        from slm.evaluate.speak import run
    run(**settings)


if __name__ == "__main__":
    main()
