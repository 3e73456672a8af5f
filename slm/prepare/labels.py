"""Spans of characters -> a label for every token, signal or noise; or which are no targets.

A document may say which of its characters are signal; all others are noise. A token has the label
of the majority of its UTF-8 bytes, which the encoder counts exactly, so that no token is aligned by
guessing. One without a majority has none: EOS, special tokens, half and half. A mask takes what
stands half in it, and what has no bytes with the token before it: a masked end has no EOS to learn.
d documents have n tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from slm.prepare.documents import Span, Text

SIGNAL, NOISE, UNKNOWN = 1, 0, -1
LABELS = (UNKNOWN, NOISE, SIGNAL)


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same characters in ascending spans that neither touch nor are empty."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return merged


def byte_edges(text: str, spans: Iterable[Span]) -> np.ndarray:  # (2k,) int64, ascending
    """Start and end of each merged span, in UTF-8 bytes."""
    edges, at, reached = [], 0, 0
    for edge in (edge for span in merge(spans) for edge in span):
        reached += len(text[at:edge].encode())
        edges.append(reached)
        at = edge
    return np.array(edges, np.int64)


def bytes_inside(places: np.ndarray, edges: np.ndarray) -> np.ndarray:  # (m,), (2k,) -> (m,)
    """Bytes of signal before each place; the line through the edges is exact at whole numbers."""
    if len(edges) == 0:
        return np.zeros_like(places)
    lengths = edges[1::2] - edges[::2]
    after = np.cumsum(lengths)
    reached = np.column_stack([after - lengths, after]).ravel()
    return np.interp(places, edges, reached).round().astype(np.int64)


def label_text(text: str, spans: Iterable[Span], sizes: np.ndarray) -> np.ndarray:  # (n,) int8
    """Labels of the tokens of one text; `sizes` (n,) are their bytes."""
    ends = np.cumsum(sizes, dtype=np.int64)
    inside = np.diff(bytes_inside(ends, byte_edges(text, spans)), prepend=0)
    majority = np.sign(2 * inside - sizes)  # 1, -1, or 0 where there is none
    return np.array([UNKNOWN, SIGNAL, NOISE], np.int8)[majority]


def label_tokens(
    texts: Sequence[Text],  # d
    sizes: np.ndarray,  # (n,): bytes of each token
    lengths: np.ndarray,  # (d,): tokens of each text
) -> tuple[np.ndarray, np.ndarray]:  # (n,) int8; (2, d): tokens of signal, of noise
    """Of all texts; those without spans are unknown."""
    labels, counts = np.full(len(sizes), UNKNOWN, np.int8), np.zeros((2, len(texts)), np.int64)
    for i, (text, end) in enumerate(zip(texts, np.cumsum(lengths), strict=True)):
        if text.spans is not None:
            mine = slice(end - lengths[i], end)
            labels[mine] = label_text(text.text, text.spans, sizes[mine])
            counts[:, i] = [np.count_nonzero(labels[mine] == label) for label in (SIGNAL, NOISE)]
    return labels, counts


def masked_text(text: str, spans: Iterable[Span], sizes: np.ndarray) -> np.ndarray:  # (n,) bool
    """Which tokens of one text `spans` mask; `sizes` (n,) are their bytes."""
    ends = np.cumsum(sizes, dtype=np.int64)
    inside = np.diff(bytes_inside(ends, byte_edges(text, spans)), prepend=0)
    masked = (inside > 0) & (2 * inside >= sizes)
    place = np.where(sizes > 0, np.arange(len(sizes)), 0)
    return masked[np.maximum.accumulate(place)]


def untrained_tokens(
    texts: Sequence[Text],  # d
    sizes: np.ndarray,  # (n,): bytes of each token
    lengths: np.ndarray,  # (d,): tokens of each text
) -> np.ndarray:  # (n,) bool
    """Those that a mask covers, or that have a weight of 0."""
    found = np.zeros(len(sizes), bool)
    for text, end, length in zip(texts, np.cumsum(lengths), lengths, strict=True):
        mine = slice(end - length, end)
        if np.float32(text.weight) == 0:
            found[mine] = True
        elif text.masked:
            found[mine] = masked_text(text.text, text.masked, sizes[mine])
    return found
