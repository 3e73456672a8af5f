"""The order of training samples: a pure function of (seed, epoch, index).

`keyed` computes where sample n of a pass lies; nothing of the corpus's size is held or made. It is
a Feistel network over Z_a x Z_b, a * b just above the number of windows, with cycle walking (Black
and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, method 3): a bijection whatever its round
function. `permutation` is the order of earlier builds, whole in memory at 8 bytes a window; their
runs go on with it. run.json says which (slm/train/identity.py).

One optimizer step reads the next `batch_size` windows of the permuted corpus, whatever the number
of ranks and of micro-batches: micro-batch a of rank r is number a * world_size + r of the step. The
number of windows consumed is the datamodule's state, so a resumed run sees what it would have seen.
"""

from collections.abc import Callable, Iterator, Sequence
from math import isqrt

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from slm.errors import UserError
from slm.store.windows import Batch, Windows

OLD, NEW = "permutation", "keyed"
ROUNDS = 12  # of 8, the orders of six windows are not equally likely yet
Places = Callable[[np.ndarray], np.ndarray]  # numbers of samples in a pass -> their windows


class Keyed:
    """A bijection of [0, size), size < 2**64: of the numbers that are asked for, and no others."""

    def __init__(self, size: int, seed: int, epoch: int):
        self.size, self.rows = size, isqrt(size - 1) + 1
        self.columns = -(-size // self.rows)
        # Not [seed, epoch]: a long seed's words would run into the epoch.
        sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
        self.keys = sequence.generate_state(ROUNDS, np.uint64).reshape(-1, 2)

    def __call__(self, places: np.ndarray) -> np.ndarray:  # (n,) -> (n,) int64
        windows = self._network(places.astype(np.uint64))
        # Walk on from those outside: the cycle that a place lies on leads back inside.
        while len(outside := np.flatnonzero(windows >= self.size)):
            windows[outside] = self._network(windows[outside])
        return windows.astype(np.int64)

    def _network(self, number: np.ndarray) -> np.ndarray:  # (n,) uint64, below rows * columns
        row, column = np.divmod(number, np.uint64(self.columns))
        for one, other in self.keys:
            row = (row + mixed(column, one)) % np.uint64(self.rows)
            column = (column + mixed(row, other)) % np.uint64(self.columns)
        return row * np.uint64(self.columns) + column


class KeyedRows(Keyed):
    """The bijections of several epochs, a row each, in as many calls of NumPy as one takes."""

    def __init__(self, size: int, seed: int, epochs: Sequence[int]):
        super().__init__(size, seed, 0)
        keys = [Keyed(size, seed, epoch).keys for epoch in epochs]
        self.keys = np.stack(keys, -1)[..., None]  # (ROUNDS / 2, 2, epochs, 1)

    def __call__(self, places: np.ndarray) -> np.ndarray:  # (epochs, n) -> (epochs, n) int64
        windows = self._network(places.astype(np.uint64))
        while (outside := windows >= self.size).any():
            windows = np.where(outside, self._network(windows), windows)
        return windows.astype(np.int64)


def mixed(number: np.ndarray, key: np.uint64) -> np.ndarray:  # (n,) uint64
    """48 bits of the finalizer of SplitMix64 (Steele, Lea and Flood, 2014): sums do not wrap."""
    number = number ^ key
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (number ^ (number >> np.uint64(31))) >> np.uint64(16)


def permutation(size: int, seed: int, epoch: int) -> Places:
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return generator.permutation(size).__getitem__


ORDERS: dict[str, Callable[[int, int, int], Places]] = {NEW: Keyed, OLD: permutation}


class Order:
    """Sample n of the run is a window of pass n // num_windows."""

    def __init__(self, num_windows: int, seed: int, kind: str = NEW):
        self.num_windows, self.seed, self.kind = num_windows, seed, kind
        self._pass: tuple[int, Places] | None = None

    def _windows_of(self, epoch: int) -> Places:
        if self._pass is None or self._pass[0] != epoch:
            self._pass = epoch, ORDERS[self.kind](self.num_windows, self.seed, epoch)
        return self._pass[1]

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(windows, epochs) of the samples [start, stop); a range may cross into the next pass."""
        return self.at(np.arange(start, stop))

    def at(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (n,) -> (n,), (n,)
        epochs, within = np.divmod(samples, self.num_windows)
        windows = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            windows[rows] = self._windows_of(int(epoch))(within[rows])
        return windows, epochs


class Mixed:
    """Sample n of a run over several parts, each in an order of its own, by their shares.

    A part's share of the first n samples is exact to within one sample wherever n is a multiple of
    `block`; in a block, chance says which sample is of which part. It is long enough for one sample
    of the smallest part: else rounding could take back in a block what it gave in the one before.

    sizes:   windows of each part, which follow one another
    shares:  of each; they sum to 1
    """

    BLOCK, AT_ONCE = 128, 2**13  # samples at least; samples, for speed alone

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int, kind: str = NEW):
        self.orders = [Order(size, seed, kind) for size in sizes]
        self.first = np.cumsum([0, *sizes])
        # In billionths, so that Python's whole numbers say what lies before any sample.
        sums = np.cumsum(shares[:-1])
        self.cumulative = [0, *(round(10**9 * float(share)) for share in sums), 10**9]
        least = int(np.diff(self.cumulative).min())
        self.block = max(self.BLOCK, 1 << (-(-(10**9) // least) - 1).bit_length())
        self.at_once = max(1, self.AT_ONCE // self.block)  # blocks
        self.seed = seed
        self._last: tuple[int, np.ndarray] | None = None

    def before(self, block: int) -> np.ndarray:  # (parts + 1,)
        """How many samples of the first 0, 1, 2, ... parts come before the block."""
        return np.array([share * block * self.block // 10**9 for share in self.cumulative])

    def counts(self, samples: int) -> np.ndarray:  # (parts,)
        """Samples of each part among the first so many."""
        block, rest = divmod(samples, self.block)
        last = np.bincount(self._parts([block])[0][:rest], minlength=len(self.orders))
        return np.diff(self.before(block)) + last

    def _parts(self, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of the blocks' samples, their parts, and their numbers among the samples of the part."""
        before = np.array([self.before(block) for block in blocks])  # (blocks, parts + 1)
        edges = np.array([self.before(block + 1) for block in blocks]) - before
        row = np.tile(np.arange(self.block), (len(blocks), 1))
        places = KeyedRows(self.block, self.seed, blocks)(row)
        found = [np.searchsorted(*pair, side="right") for pair in zip(edges, places, strict=True)]
        parts = np.array(found) - 1  # (blocks, block)
        of_part = parts[..., None] == np.arange(len(self.orders))
        earlier = np.take_along_axis(of_part.cumsum(1), parts[..., None], axis=2)[..., 0] - 1
        numbers = np.take_along_axis(np.diff(before), parts, axis=1) + earlier
        return parts.reshape(-1), numbers.reshape(-1)

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(windows, epochs) of the samples [start, stop); epochs are those of a window's part."""
        stretches, within = np.divmod(np.arange(start, stop), self.at_once * self.block)
        found = np.empty((2, stop - start), np.int64)
        for stretch in np.unique(stretches):
            rows = stretches == stretch
            found[:, rows] = self._stretch(int(stretch))[:, within[rows]]
        return found[0], found[1]

    def _stretch(self, stretch: int) -> np.ndarray:  # (2, at_once * block)
        """Windows and epochs of blocks that are read one after another."""
        if self._last is None or self._last[0] != stretch:
            blocks = range(stretch * self.at_once, (stretch + 1) * self.at_once)
            parts, numbers = self._parts(blocks)
            found = np.empty((2, len(parts)), np.int64)
            for part in np.unique(parts):
                windows, epochs = self.orders[part].at(numbers[parts == part])
                found[:, parts == part] = windows + self.first[part], epochs
            self._last = stretch, found
        return self._last[1]


class Steps(Dataset):
    """Item `step` is the list of micro-batches of one optimizer step on one rank."""

    def __init__(
        self,
        windows: Windows,
        order: Order | Mixed,
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
