"""`python -m slm.train`, which `slm train` runs."""

from typing import Any

from slm.cli import command, imports
from slm.train.keys import check_run


@command("train", check_run)
def main(**settings: Any) -> None:
    with imports():
        from slm.train.command import run
    run(**settings)


if __name__ == "__main__":
    main()
