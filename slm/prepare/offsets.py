"""The bytes of each token by offsets, where the vocabulary does not tell."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

import numpy as np

from slm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def bytes_by_offsets(backend: Tokenizer, text: str, tokens: np.ndarray) -> np.ndarray:
    """The bytes up to a token's end that no earlier token has; the last takes what remains."""
    encoding = backend.encode(text, add_special_tokens=False)
    if encoding.ids != tokens.tolist():
        raise UserError(
            f"gigatoken has other ids than tokenizers for {reprlib.repr(text)}, though it gave the "
            "same ones before: tokenizer.encoder=tokenizers does without it"
        )
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    reached = np.concatenate([[0], np.cumsum(width)])
    ends = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(points)
    return np.diff(reached[ends], prepend=0)


def fit(sizes: np.ndarray, limit: int) -> np.ndarray:
    """Move what exceeds `limit` to the neighbours, later ones first; the sum stays.

    A normalizer that removes 70,000 spaces leaves one token with 70,001 bytes.
    """
    if sizes.max() <= limit:
        return sizes
    index, total = np.arange(1, len(sizes) + 1), sizes.sum()
    assert total <= limit * len(sizes), f"{total} bytes do not fit {len(sizes)} x {limit}"
    reached = np.minimum.accumulate(np.cumsum(sizes) - limit * index) + limit * index
    reached = np.minimum(reached, limit * index)
    reached = np.maximum(reached, total - limit * (len(sizes) - index))
    return np.diff(reached, prepend=0)
