"""A reference model on this machine: its scores, how it computes them, and what that costs."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from slm.errors import UserError
from slm.model.build import SelectiveLM
from slm.model.device import computing, device_name
from slm.model.flops import forward_flops_per_token
from slm.model.predict import predicted
from slm.score.pieces import first_piece, in_pieces, pieces_of
from slm.score.scorer import Arrays, Source
from slm.store.columns import Column, columns_named
from slm.store.files import Json
from slm.store.windows import IGNORE_INDEX, Batch, Windows, to_device

READ_AHEAD = 2  # batches


def how_it_computes(config: Any, lm: SelectiveLM) -> Json:
    return {
        "dtype": config.dtype,
        "store_dtype": config.store_dtype,
        "attn_implementation": lm.model.config._attn_implementation,
        "device": lm.model.device.type,
    }


def forward_cost(lm: SelectiveLM, seconds: float, tokens: int, flops: float | None) -> Json:
    """flops: of a token"""
    return {
        "seconds": seconds,
        "tokens": tokens,
        "flops": None if flops is None else tokens * flops,
        "device": device_name(lm.model.device),
    }


def window_scores(
    lm: SelectiveLM,
    windows: Windows,
    numbers: np.ndarray,
    columns: Sequence[Column],
    length: int | None = None,  # T, where it is less than a window
) -> Arrays:  # (B, T) float32 each
    """What the columns hold of every target of these windows; NaN where there is none."""
    batch = windows.batch(numbers)
    batch = batch if length is None else first_piece(batch, length)
    return checked(batch, predicted(lm, to_device(batch, lm.model.device), columns), columns)


def checked(batch: Batch, scores: Mapping[str, Tensor], columns: Sequence[Column]) -> Arrays:
    """Waits for the device."""
    live, numbers = batch["targets"].numpy() != IGNORE_INDEX, batch["window"].numpy()
    found = {column.name: scores[column.key].float().cpu().numpy() for column in columns}
    for column in columns:
        values = found[column.name]
        wrong = column.is_wrong(values) & live
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            raise UserError(
                f"the model gives target {place} of window {numbers[row]} "
                f"{column.refusal(values[row, place])}"
            )
    return found


@dataclass
class ModelScores(Source):
    """The reference model, on this machine.

    short:  context and stride, in tokens, where each is predicted from fewer than its window has
    """

    lm: SelectiveLM
    windows: Windows
    more: Sequence[str] = ()  # columns beside those that every store has
    dtype: str = "float32"
    short: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.lm.eval()
        self.columns = columns_named(self.more)
        length = self.windows.corpus.seq_len
        context, stride = self.short or (length, length)
        read = sum(piece.length for piece in pieces_of(0, length, context, stride))
        self.flops = forward_flops_per_token(self.lm.model, context)
        if self.flops is not None:
            self.flops *= read / length

    def scores(self, numbers: np.ndarray) -> Arrays:
        return next(self.stream(iter([numbers])))[1]

    def compute(self, batch: Batch) -> Mapping[str, Tensor]:
        """(B, T) by the columns' keys; the device may still be at it."""
        return in_pieces(batch, *self.short, self.forward) if self.short else self.forward(batch)

    def forward(self, batch: Batch) -> Mapping[str, Tensor]:
        with computing(self.lm.model.device, self.dtype):
            return predicted(self.lm, to_device(batch, self.lm.model.device), self.columns)

    @contextmanager
    def leading(self) -> Iterator[bool]:
        """Yields whether this process fills the store."""
        yield True

    def stream(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Arrays]]:
        """Of one batch after the other. While the device computes one, the next two are read by a
        thread, and the scores of the one before are checked and written into their shard.
        """
        waiting = None
        with ThreadPoolExecutor(1) as reader:
            numbers = [*islice(batches, READ_AHEAD)]
            reads = deque((each, reader.submit(self.windows.batch, each)) for each in numbers)
            while reads:
                each, read = reads.popleft()
                reads.extend((n, reader.submit(self.windows.batch, n)) for n in islice(batches, 1))
                batch = read.result()
                scores = self.compute(batch)
                if waiting is not None:
                    yield waiting[0], checked(*waiting[1:], self.columns)
                waiting = each, batch, scores
        if waiting is not None:
            yield waiting[0], checked(*waiting[1:], self.columns)

    def cost(self, seconds: float, tokens: int) -> Json:
        return forward_cost(self.lm, seconds, tokens, self.flops)
