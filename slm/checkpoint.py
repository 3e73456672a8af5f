"""Checkpoints that survive: atomic, hashed, complete, on optimizer steps only.

    checkpoints/step-00000400.ckpt        Lightning checkpoint: weights, optimizer, schedule, order
    checkpoints/step-00000400.ckpt.json   its sha256, written last; without it: unfinished
    checkpoints/step-00000400.ckpt.damaged  did not verify when a run went on; nothing reads it
    checkpoints/best-00000300.ckpt        the one of lowest held-out loss

Lightning saves through a temporary file on another file system, saves no random states, ends with
exit code 0 on SIGTERM and trains on after NaN; the pieces here replace that.
"""

import logging
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves

from slm.errors import UserError
from slm.fields import CHECKPOINT, check_fields
from slm.shards import Json, atomic_file, check_hash, hash_file, read_json, write_record

log = logging.getLogger("slm.checkpoint")


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes in the target's own folder, syncs, renames, then writes the hash; load checks it.

    check_owner: raises where another process has the run's folder now
    """

    def __init__(self, check_owner: Callable[[], None]):
        self.check_owner = check_owner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None):
        self.check_owner()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sidecar(path).unlink(missing_ok=True)
        with atomic_file(path, tensor_bytes(checkpoint)) as file:
            torch.save(checkpoint, file)
        record = {
            "kind": "checkpoint",
            "sha256": hash_file(path),
            "step": checkpoint["global_step"],
            "tokens_seen": checkpoint["about"]["tokens_seen"],
        }
        write_record(sidecar(path), record)

        aside(path).unlink(missing_ok=True)  # there is a whole one of this step again

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True):
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        sidecar(Path(path)).unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)


def tensor_bytes(checkpoint: dict[str, Any]) -> int:
    leaves = tree_leaves(checkpoint)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Plain types and tensors of a file that verifies; nothing else that it may hold is made."""
    check_checkpoint(path)
    try:
        saved = torch.load(path, map_location=map_location, weights_only=True)
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
    check_hash(path, read_sidecar(path)["sha256"], sidecar(path).name)


def read_sidecar(path: Path) -> Json:
    """What is said of a checkpoint, which may have many gigabytes itself."""
    record = read_json(sidecar(path))
    check_fields(sidecar(path), record, CHECKPOINT)
    return record


def aside(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")


def set_aside(path: Path) -> None:
    """Rename what does not verify, so that its step is made again and nothing counts it."""
    os.replace(path, aside(path))
    sidecar(path).unlink(missing_ok=True)


def verified(paths: Iterable[Path], warn: Callable[[str], None]) -> Iterator[Path]:
    """Those that verify, looked at as they are asked for; what does not is set aside."""
    for path in paths:
        try:
            check_checkpoint(path)
        except UserError as error:
            set_aside(path)
            warn(f"{error}; it is {aside(path).name} now, and the one before is looked at")
            continue
        yield path


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; what does not is reported and set aside."""
    paths = sorted(folder.glob("*-*.ckpt"), key=lambda path: path.stem.split("-")[1], reverse=True)
    return next(verified(paths, warn), None)


class OnlyWriter(Callback):
    """Ends the run before it logs or saves a step in a folder that is another process's now."""

    def __init__(self, check_owner: Callable[[], None]):
        self.check_owner = check_owner

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_owner()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if step_ended(trainer, batch_idx):
            self.check_owner()


def step_ended(trainer: Trainer, batch_idx: int) -> bool:
    """True at the last micro-batch of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_due(trainer: Trainer, every_tokens: int | None, parts: int) -> bool:
    """True where the step that just ended crossed a multiple of `every_tokens`, and at the end.

    Without `every_tokens`, `parts` times in the run.
    """
    per_step = trainer.datamodule.tokens_per_step  # type: ignore[attr-defined]
    every = every_tokens or max(1, trainer.max_steps * per_step // parts)
    seen = trainer.global_step * per_step
    return seen // every > (seen - per_step) // every or trainer.global_step == trainer.max_steps


class Checkpoints(Callback):
    """Saves every `every_tokens` tokens and at the end; keeps the last `keep` and the best.

    every_tokens: null for ten times in the run
    keep:         null for all of them, and one before the first step
    best_of:      the held-out set whose loss decides which one is best; null keeps none
    """

    def __init__(
        self, folder: str, every_tokens: int | None, keep: int | None, best_of: str | None
    ):
        self.folder, self.every_tokens, self.keep = Path(folder), every_tokens, keep
        self.best_of, self.best_loss = best_of, float("inf")
        self.whole: set[Path] = set()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.keep is None and trainer.global_step == 0:
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_ended(trainer, batch_idx):
            return
        self._save_best(trainer, pl_module.heldout_losses)
        if is_due(trainer, self.every_tokens, parts=10):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        if trainer.strategy.broadcast(not sidecar(path).exists()):
            self._write(trainer, path)
        if self.keep is not None:
            self._prune(trainer, "step", self.keep)

    def _write(self, trainer: Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        self.whole.add(path)

    def _save_best(self, trainer: Trainer, losses: dict[str | None, float]) -> None:
        """Saving takes all ranks, and each computed the loss by itself: rank 0's counts."""
        if self.best_of not in losses:
            return
        loss = trainer.strategy.broadcast(losses[self.best_of])
        if loss < self.best_loss:
            self.best_loss = loss
            self._write(trainer, self.folder / f"best-{trainer.global_step:08d}.ckpt")
            self._prune(trainer, "best", 1)

    def _prune(self, trainer: Trainer, kind: str, keep: int) -> None:
        if not trainer.is_global_zero:
            return
        paths = sorted(self.folder.glob(f"{kind}-*.ckpt"), reverse=True)
        kept = list(islice(self._whole(paths), keep))
        for path in paths[paths.index(kept[-1]) + 1 :]:
            trainer.strategy.remove_checkpoint(path)

    def _whole(self, paths: list[Path]) -> Iterator[Path]:
        """Those that verify; each is read once in a run, and what was just written not at all."""
        for path in paths:
            if path in self.whole or any(verified([path], log.warning)):
                self.whole.add(path)
                yield path

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]


class RandomStates(Callback):
    """Saves and restores python's, NumPy's, torch's and CUDA's random states, of every rank."""

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        states = [random_state()]
        if torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, random_state())
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on with more ranks has states for the first ones; the others take theirs
        in turn, as all ranks of a new run begin with one state."""
        if self.restored is not None:
            states = self.restored["ranks"]
            set_random_state(states[trainer.global_rank % len(states)])


def random_state() -> dict[str, Any]:
    """Plain types and tensors only: checkpoints are loaded with weights_only=True."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": list(random.getstate()[1]),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"]), None))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)


class StopOnSignal(Callback):
    """SIGTERM and the first Ctrl-C save a checkpoint at the next step and exit with 143 or 130."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints, self.received = checkpoints, 0
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_ended(trainer, batch_idx):
            return
        received = trainer.strategy.reduce_boolean_decision(self.received != 0, all=False)
        if received:
            self.checkpoints.save(trainer)
            log.warning("stopped at step %d, saved; the same command goes on", trainer.global_step)
            raise SystemExit(128 + (self.received or signal.SIGTERM))

    # Before Lightning takes its own handlers back. In teardown, which comes later, they would be
    # installed for good, and hold this run's trainer and model while a sweep goes on.
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
