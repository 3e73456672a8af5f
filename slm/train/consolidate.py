"""A checkpoint that several ranks wrote, as one file: `slm consolidate`."""

import logging
from pathlib import Path

from slm.command_keys import CONSOLIDATE
from slm.errors import UserError
from slm.stage import Folder, stage
from slm.store.claims import Unclaimed
from slm.train.checkpoint import VerifiedCheckpointIO, read_checkpoint

log = logging.getLogger("slm.train")


@stage(CONSOLIDATE)
def consolidate_checkpoint(checkpoint: Folder, out: Folder) -> Path:
    """The checkpoint that one process would have written. Takes memory for all of it.

    Args:
        checkpoint: step-00000400.ckpt, a folder in a run's checkpoints/ (trainer=fsdp).
        out: a file ending in .ckpt, which must not exist; its record comes beside it.

    Returns:
        `out`.

    Raises:
        UserError: the checkpoint does not verify, or is one file already; `out` exists.
    """
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser()
    if source.is_file():
        raise UserError(f"{source} is one file already")
    if target.suffix != ".ckpt" or target.exists():
        what = "exists" if target.exists() else "must end in .ckpt"
        raise UserError(f"out={out} {what}: it is the file to be written, step-00000400.ckpt")
    whole = read_checkpoint(source)
    VerifiedCheckpointIO(Unclaimed()).save_checkpoint(whole, target)
    log.info("%s", target)
    return target
