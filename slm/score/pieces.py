"""Tokens that are read in overlapping pieces, each scored in the one that gives it most context.

A piece holds `context` tokens and begins `stride` after the one before. A token of
a window or document is predicted from all before it there while these are at most `context`, else
from the last context - stride + 1 to context of them: the short context of LongCE (arXiv
2410.23771), 4,096 refreshed every 1,024.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm.errors import UserError
from slm.store.shards import Corpus
from slm.store.windows import IGNORE_INDEX, Batch


class Piece(NamedTuple):
    """A window of a document: the inputs [begin, begin + length) of its first token and tokens."""

    document: int
    begin: int
    length: int
    skip: int  # targets at its start that the window before has


def pieces_of(document: int, count: int, context: int, stride: int) -> Iterator[Piece]:
    """Windows of a document of `count` tokens: each token is in the first that reaches it."""
    begin, reached = 0, 0
    while reached < count:
        length = min(context, count - begin)
        yield Piece(document, begin, length, reached - begin)
        reached, begin = begin + length, begin + stride


def piece_of(batch: Batch, piece: Piece) -> Batch:
    """The part of each window of a batch; a document that began before it begins anew."""
    inside = slice(piece.begin, piece.begin + piece.length)
    part = {name: batch[name][:, inside] for name in ("input_ids", "targets")}
    part["targets"] = part["targets"].clone()
    part["targets"][:, : piece.skip] = IGNORE_INDEX
    if "position_ids" in batch:
        here = torch.arange(piece.length, device=part["targets"].device)
        part["position_ids"] = torch.minimum(batch["position_ids"][:, inside], here)
    return part


def first_piece(batch: Batch, length: int) -> Batch:
    return batch | piece_of(batch, Piece(0, 0, length, 0))


def in_pieces(
    batch: Batch,
    context: int,
    stride: int,
    scores: Callable[[Batch], Mapping[str, Tensor]],
) -> dict[str, Tensor]:  # (B, T) each
    """What `scores` says of each target in the short context."""
    parts = []
    for piece in pieces_of(0, batch["targets"].shape[1], context, stride):
        found = scores(piece_of(batch, piece))
        parts.append({key: values[:, piece.skip :] for key, values in found.items()})
    return {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}


# ---- what is asked for --------------------------------------------------------------------------


def check_short(settings: Mapping[str, Any], way: str) -> None:
    context, stride = settings["context"], settings["stride"]
    if context is None:
        raise UserError(f"stride is {stride}, and there is no context that it would refresh")
    if way != "reference_model" or settings["scores"] == "vllm":
        other = "scores=vllm" if way == "reference_model" else way
        raise UserError(f"context is {context}, but {other} has the context of whole windows")


def short_context(config: Any, corpus: Corpus) -> tuple[int, int] | None:
    """Context and stride of windows that are scored with fewer tokens than they have."""
    if config.context is None:
        return None
    if config.context >= corpus.seq_len:
        raise UserError(
            f"context is {config.context}, and a window of {corpus.folder} has {corpus.seq_len}: "
            "it would shorten nothing"
        )
    return config.context, stride_of(config, config.context)


def stride_of(config: Any, context: int, before: int | None = None) -> int:
    """before: what the store says"""
    stride = config.stride or before or max(1, context // 2)
    if stride > context:
        raise UserError(f"stride is {stride}, context is {context}: tokens between would be lost")
    return stride
