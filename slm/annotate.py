"""`python -m slm.annotate`, which `slm annotate` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command
from slm.command_keys import ANNOTATE


@command("annotate", partial(check, table=ANNOTATE))
def main(**settings: Any) -> None:
    from slm.quality.annotate import annotate

    annotate(**settings)


if __name__ == "__main__":
    main()
