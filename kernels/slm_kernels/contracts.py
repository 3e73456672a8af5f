"""What implementations take and return: N tokens, K with a weight, D width, V vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The output layer: z = logit_scale * (hidden @ weight.T + bias), then the soft cap."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    part: Any = None  # vocabulary.Part where the weight's rows are cut over ranks

    @property
    def vocab_size(self) -> int:
        return len(self.weight) if self.part is None else self.part.vocab_size


class TokenCrossEntropy(NamedTuple):
    """Per token, without gradient; zero and False where the target is ignored."""

    loss: Tensor  # (...), -log p(target), nats
    lse: Tensor  # (...), log of the sum of exp(logits)
    entropy: Tensor | None  # (...), of the predicted distribution, nats; None unless wanted
    correct: Tensor  # (...), bool: the target is the lowest index of the maximal logit


class TokenStats(NamedTuple):
    """What a forward pass keeps. lse is in two parts: z - row_max is exact where z - lse is not."""

    loss: Tensor  # (N,)
    row_max: Tensor  # (N,), maximal logit; 0 where ignored
    sum_exp: Tensor  # (N,), sum of exp(z - row_max); 1 where ignored
    entropy: Tensor | None  # (N,), None unless wanted
    correct: Tensor | None  # (N,) bool, None unless wanted


class LogitsCache(NamedTuple):
    """The first C columns' exp(z - offset), written by the forward pass, C = 0 without a budget."""

    exps: Tensor  # (N, C), at most 1; in `cache_dtype`
    offset: Tensor  # (N, C / block rounded up), in the compute dtype
    block: int  # columns that share an offset


class HeadGradients(NamedTuple):
    """None where not wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


def compute_dtype(operand: Tensor) -> torch.dtype:
    return torch.float64 if operand.dtype == torch.float64 else torch.float32


def cache_dtype(operand: Tensor) -> torch.dtype:
    """Two bytes a logit, but for float64; an exponential keeps 2^-9 (bfloat16) or 2^-12 of it."""
    return torch.float16 if operand.dtype == torch.float32 else operand.dtype


def new_cache(
    hidden: Tensor,  # (N, D)
    vocab_size: int,
    max_bytes: int,
    block: int,
) -> LogitsCache:
    """As many blocks of columns as fit in `max_bytes`."""
    num_rows, dtype, offset_dtype = len(hidden), cache_dtype(hidden), compute_dtype(hidden)
    block_bytes = num_rows * (block * dtype.itemsize + offset_dtype.itemsize)
    blocks = min(max_bytes // max(1, block_bytes), -(-vocab_size // block))
    exps = hidden.new_empty((num_rows, min(blocks * block, vocab_size)), dtype=dtype)
    return LogitsCache(exps, hidden.new_empty((num_rows, blocks), dtype=offset_dtype), block)
