"""`python -m slm.prepare`, which `slm prepare` runs."""

import gc
from functools import partial
from typing import Any

from slm.cli import command, imports
from slm.command_keys import PREPARE
from slm.store.inputs import check_command


@command("prepare", partial(check_command, table=PREPARE))
def main(**settings: Any) -> None:
    with imports():
        import transformers.tokenization_utils_tokenizers  # noqa: F401 - every run loads a tokenizer

        from slm.prepare.command import run
    gc.freeze()  # nor does a later search look at them; Triton, which is not among them, would mind
    run(**settings)


if __name__ == "__main__":
    main()
