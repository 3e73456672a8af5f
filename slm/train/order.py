"""The order of training samples: a pure function of (seed, epoch, index).

One optimizer step reads the next `batch_size` windows of the permuted corpus, whatever the number
of ranks and of micro-batches: micro-batch a of rank r is number a * world_size + r of the step. The
number of windows consumed is the datamodule's state, so a resumed run sees what it would have seen.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from slm.errors import UserError
from slm.store.windows import Batch, Windows


class Order:
    """The order of training samples: sample n of the run is a window of pass n // num_windows."""

    def __init__(self, num_windows: int, seed: int):
        self.num_windows, self.seed = num_windows, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def _permuted(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(self.num_windows)
        return self._permutation

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(windows, epochs) of the samples [start, stop); a range may cross into the next pass."""
        epochs = np.arange(start, stop) // self.num_windows
        windows = np.empty(stop - start, np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            within = np.arange(start, stop)[rows] % self.num_windows
            windows[rows] = self._permuted(int(epoch))[within]
        return windows, epochs


class Steps(Dataset):
    """Item `step` is the list of micro-batches of one optimizer step on one rank."""

    def __init__(
        self,
        windows: Windows,
        order: Order,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.windows, self.order = windows, order
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, index: int) -> list[Batch] | UserError:
        try:
            return self._read(index)
        except UserError as error:  # a worker would wrap it in a traceback; the reader raises it
            return error

    def _read(self, step: int) -> list[Batch]:
        start = step * self.batch_size
        places, epochs = self.order.samples(start, start + self.batch_size)
        windows = self.windows.available[places]
        shape = (-1, self.world_size, self.micro_batch_size)
        mine = windows.reshape(shape)[:, self.rank]  # (A, B)
        batch = self.windows.batch(mine.reshape(-1))
        batch["epoch"] = torch.from_numpy(epochs.reshape(shape)[:, self.rank].reshape(-1))
        parts = {key: value.split(self.micro_batch_size) for key, value in batch.items()}
        return [{key: value[index] for key, value in parts.items()} for index in range(len(mine))]


class MicroBatches:
    """The endless stream of micro-batches that Lightning iterates over, from step `start` on."""

    def __init__(self, steps: Steps, start: int, num_workers: int, pin_memory: bool):
        self.start = start
        self.loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(start, 2**62),  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Its own generator: starting an iterator must not draw from the global random state.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        for step in self.loader:
            if isinstance(step, UserError):
                raise step
            yield from step
