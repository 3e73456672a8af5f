"""Checkpoints that survive: atomic, hashed, complete, on optimizer steps only.

    checkpoints/step-00000400.ckpt        Lightning checkpoint: weights, optimizer, schedule, order
    checkpoints/step-00000400.ckpt.json   its sha256, written last; without it: unfinished
    checkpoints/step-00000400.ckpt/       with trainer=fsdp, a folder (sharded_checkpoint.py)
    checkpoints/step-00000400.ckpt.damaged  did not verify when a run went on; nothing reads it
    checkpoints/best-00000300.ckpt        the one of lowest held-out loss

Lightning saves through a temporary file on another file system, saves no random states, ends with
exit code 0 on SIGTERM and trains on after NaN; the pieces here replace that.
"""

import logging
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves

from slm.errors import UserError
from slm.store.claims import Owner
from slm.store.fields import CHECKPOINT, check_fields
from slm.store.files import (
    Json,
    Publish,
    atomic_file,
    check_content,
    hash_file,
    read_json,
    remove,
    write_record,
)
from slm.train.sharded_checkpoint import read_whole

log = logging.getLogger("slm.train.checkpoint")


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes in the target's own folder, syncs, renames, then writes the hash; load checks it.

    owner: of the run's folder; it publishes, so that a process that has lost it overwrites nothing
    """

    def __init__(self, owner: Owner):
        self.owner = owner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None):
        self.owner.check()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sidecar(path).unlink(missing_ok=True)
        if path.is_dir():
            remove(path)
        with atomic_file(path, tensor_bytes(checkpoint), self.owner.publish) as file:
            torch.save(checkpoint, file)
        vouch(path, checkpoint, {"sha256": hash_file(path)}, self.owner.publish)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True):
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        remove_checkpoint(Path(path))


def vouch(
    path: Path, checkpoint: Mapping[str, Any], hashes: Json, publish: Publish | None = None
) -> None:
    """The record of what is there, whole."""
    record = {
        "kind": "checkpoint",
        "step": checkpoint["global_step"],
        "tokens_seen": checkpoint["about"]["tokens_seen"],
    }
    write_record(sidecar(path), record | hashes, publish)
    remove(aside(path))  # there is a whole one of this step again


def remove_checkpoint(path: Path) -> None:
    sidecar(path).unlink(missing_ok=True)
    remove(path)


def step_of(path: Path) -> int:
    return int(path.stem.split("-")[1])


def tensor_bytes(checkpoint: dict[str, Any]) -> int:
    leaves = tree_leaves(checkpoint)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Plain types and tensors of a file that verifies; nothing else that it may hold is made."""
    check_checkpoint(path)
    if path.is_dir():
        return read_whole(path)
    try:
        saved = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{path} is no checkpoint of slm train, though its hash is the one beside it "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}, not a checkpoint of slm train")
    return saved


def check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not sidecar(path).exists():
        raise UserError(f"{path} is unfinished: {sidecar(path).name} is missing")
    check_content(path, read_sidecar(path), sidecar(path).name)


def read_sidecar(path: Path) -> Json:
    """What is said of a checkpoint, which may have many gigabytes itself."""
    record = read_json(sidecar(path))
    check_fields(sidecar(path), record, CHECKPOINT)
    return record


def aside(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")


def set_aside(path: Path) -> None:
    """Rename what does not verify, so that its step is made again and nothing counts it."""
    remove(aside(path))
    os.replace(path, aside(path))
    sidecar(path).unlink(missing_ok=True)


def verified(paths: Iterable[Path], warn: Callable[[str], None]) -> Iterator[Path]:
    """Those that verify, looked at as they are asked for; what does not is set aside."""
    for path in paths:
        try:
            check_checkpoint(path)
        except UserError as error:
            set_aside(path)
            warn(f"{error}; it is {aside(path).name} now")
            continue
        yield path


def newest_checkpoint(
    folder: Path, warn: Callable[[str], None], up_to: float = math.inf
) -> Path | None:
    """The newest checkpoint that verifies, of no later step than `up_to`.

    What does not verify is reported and set aside; and that nothing is left, where it was all.
    """
    paths = sorted(folder.glob("*-*.ckpt"), key=step_of, reverse=True)
    paths = [path for path in paths if step_of(path) <= up_to]
    found = next(verified(paths, warn), None)
    if paths and found is None:
        warn(f"{folder} holds no other checkpoint to go on from")
    return found
