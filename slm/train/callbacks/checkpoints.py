"""When a run is saved and ended: checkpoints on optimizer steps, random states, signals, NaN."""

import random
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from slm.errors import NonFiniteError
from slm.model.sharded import together
from slm.store.claims import Owner
from slm.store.files import hash_json
from slm.train.callbacks.base import is_due, step_ended
from slm.train.checkpoint import log, sidecar, verified
from slm.train.sharded import Sharded, data_ranks


class OnlyWriter(Callback):
    """Ends the run before it logs or saves a step in a folder that is another process's now."""

    def __init__(self, owner: Owner):
        self.owner = owner

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.owner.check()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if step_ended(trainer, batch_idx):
            self.owner.check()


class Checkpoints(Callback):
    """Saves every `every_tokens` tokens and at the end; keeps the last `keep` and the best.

    every_tokens: null for ten times in the run
    keep:         null for all of them, and one before the first step
    best_of:      the held-out set whose loss decides which one is best; null keeps none
    """

    parts = 10

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
        settle(trainer, wait=False)
        self._save_best(trainer, pl_module.heldout_losses)
        if is_due(trainer, self.every_tokens, self.parts):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy, Sharded) and trainer.strategy.saving is not None:
            settle(trainer, wait=True)
            for kind, keep in (("step", self.keep), ("best", 1)):
                if keep is not None:
                    self._prune(trainer, kind, keep)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, SystemExit | NonFiniteError):  # all ranks end at this step
            settle(trainer, wait=True)

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
        for path in paths[paths.index(kept[-1]) + 1 :] if kept else ():
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


def settle(trainer: Trainer, wait: bool) -> None:
    if isinstance(trainer.strategy, Sharded):
        trainer.strategy.settle(wait)


class RandomStates(Callback):
    """Saves and restores python's, NumPy's, torch's and CUDA's random states, of every rank; those
    that share layers out draw alike, so that what is dropped is dropped on all of them."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.rank = seed, 0
        self.restored: dict[str, Any] = {"ranks": []}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.rank = data_ranks(trainer).rank

    def state_dict(self) -> dict[str, Any]:
        if not torch.distributed.is_initialized():
            return {"ranks": [random_state()]}
        states: dict[int, Any] = {}  # of the first of those that share layers out
        for rank, state in together((self.rank, random_state())):
            states.setdefault(rank, state)
        return {"ranks": [*states.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A rank that was not there before begins with one of its own, so that dropout differs from
        rank to rank; the first rank of a new run has that of one process."""
        states, ranks = self.restored["ranks"], data_ranks(trainer)
        if not states and ranks.count < trainer.world_size:  # who made the weights has drawn
            states = [trainer.strategy.broadcast(random_state())]
        if ranks.rank < len(states):
            set_random_state(states[ranks.rank])
        elif ranks.rank > 0:
            seed_all(hash_json([self.seed, ranks.rank, trainer.global_step]))


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


def seed_all(digest: str) -> None:
    """Python's, NumPy's, torch's and CUDA's."""
    number = int(digest[:8], 16)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"]), None))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)


BEFORE_THE_LIMIT = (signal.SIGUSR1, signal.SIGUSR2)  # sbatch --signal, submitit


class StopOnSignal(Callback):
    """SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C save a checkpoint at the next step and end the
    run with 128 + their number.

    Who handled SIGUSR1 or SIGUSR2 when this was made, such as submitit, which puts the job into the
    queue again, is called once the checkpoint is there.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints, self.received = checkpoints, 0
        self.previous: dict[int, Any] = {}
        self.schedulers: dict[int, Any] = {
            number: signal.getsignal(number) for number in BEFORE_THE_LIMIT
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, *BEFORE_THE_LIMIT):
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
            if trainer.is_global_zero:
                step = trainer.global_step
                log.warning("stopped at step %d, saved; the same command goes on", step)
            if self.received in self.schedulers and callable(self.schedulers[self.received]):
                self.schedulers[self.received](self.received, None)
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
