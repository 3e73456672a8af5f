"""Which windows of a corpus its references have scores of."""

from typing import Any

import numpy as np

from slm.store.shards import SCORED


class Available:
    """Numbers of windows, ascending: what an array of them would give, found shard by shard.

    An array would be 8 bytes a window in every process that reads the corpus.
    """

    def __init__(self, windows: Any):
        self.windows = windows
        counts = windows.corpus.windows_per_shard.copy()
        partial = [store for store in windows.references if store.is_partial]
        for shard in {int(i) for store in partial for i in store.shards.having(SCORED)}:
            counts[shard] = windows.scored_of(shard).sum()
        self.before = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.before[-1])

    def __getitem__(self, where: slice | np.ndarray | int) -> Any:  # (n,) int64
        if isinstance(where, slice):
            where = np.arange(*where.indices(len(self)))
        where = np.asarray(where)
        if len(self) == len(self.windows):
            return where
        shards, found = np.searchsorted(self.before, where, side="right") - 1, where.copy()
        for shard in np.unique(shards):
            mine = shards == shard
            there = np.flatnonzero(self.windows.scored_of(shard))
            found[mine] = self.windows.first_window[shard] + there[where[mine] - self.before[shard]]
        return found
