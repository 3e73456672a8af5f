"""`python -m slm.export`, which `slm export` runs."""

from functools import partial
from typing import Any

from slm.checks import check
from slm.cli import command, imports
from slm.command_keys import EXPORT


@command("export", partial(check, table=EXPORT))
def main(**settings: Any) -> None:
    with imports():
        from slm.train.export import export_corpus
    export_corpus(form=settings.pop("as"), **settings)


if __name__ == "__main__":
    main()
