"""Scores and weights beside tokens through any collator, for the trainers of Hugging Face."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm.integrations.loss import BESIDE, COLUMN

FIRST_MARK = 2**40  # above every token id
SIDES = ("chosen", "rejected")  # of preference pairs, in the order in which TRL collates them
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCES = tuple(f"{side}_{COLUMN}" for side in SIDES)


class ReferenceCollator:
    """Any collator, with the columns (B, T) of loss.BESIDE beside what it makes, NaN where it pads.

    Where a token went is asked of the collator itself: it collates the examples once more, with
    marks in place of `input_ids`. So padding on either side, padding to a multiple, flattening and
    truncation need no code here. A collator that does not answer the same twice, because it draws
    random numbers or looks at the ids, is refused. It gets copies, which it may change.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        found = {name: scores_of(examples, name) for name in BESIDE}
        batch: Any = self.collator([without_scores(example) for example in examples])
        columns = {name: scores for name, scores in found.items() if scores}
        if columns:
            places, padding = self._places(examples, batch)
            for name, scores in columns.items():
                batch[name] = torch.cat(scores)[places].masked_fill(padding, torch.nan)
        return batch

    def _places(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:  # (B, T) into the examples' tokens in a row, (B, T) what is none
        tokens = [torch.as_tensor(example["input_ids"]) for example in examples]
        starts = np.cumsum([FIRST_MARK, *map(len, tokens)])
        marked = [
            without_scores(example) | {"input_ids": marks_like(example["input_ids"], int(start))}
            for example, start in zip(examples, starts[:-1], strict=True)
        ]
        marks = torch.as_tensor(self.collator(marked)["input_ids"])
        padding, places = marks < FIRST_MARK, (marks - FIRST_MARK).clamp(min=0)
        ids = torch.as_tensor(batch["input_ids"])
        if ids.shape != marks.shape or not (padding | (torch.cat(tokens)[places] == ids)).all():
            raise ValueError(
                f"{type(self.collator).__name__} does not put tokens at the same places twice, so "
                "nobody knows where their scores belong; make it deterministic, without a look at "
                "the ids"
            )
        return places, padding


class PairCollator:
    """Any collator of pairs, with `reference_logprob` (2B, T) where their responses' tokens went.

    They are where its completion_mask is 1, in order; what it cuts off a response, it cuts at the
    end (slm/integrations/dpo.py).
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if REFERENCES[0] not in examples[0]:
            return batch
        inside = batch["completion_mask"].bool()
        rows = [scores_beside(one, side) for side in SIDES for one in examples]
        column = torch.zeros(inside.shape)
        for row, values, mask in zip(column, rows, inside, strict=True):
            row[mask] = values[: int(mask.sum())]
        batch[COLUMN] = column
        return batch


def scores_beside(example: Mapping[str, Any], side: str) -> Tensor:  # (tokens of the response,)
    name = f"{side}_{COLUMN}"
    values, ids = scores_in(example[name]), example[f"{side}_ids"]
    if len(values) != len(ids):
        raise ValueError(f"a pair has {len(ids)} {side}_ids and {len(values)} {name}")
    if not ((values <= 0) & values.isfinite()).all():
        raise ValueError(f"{name} of a pair is {values.tolist()}, log-probs are finite and <= 0")
    return values


def scores_of(examples: Sequence[Mapping[str, Any]], name: str) -> list[Tensor]:
    """A column of the examples, nothing where none of them has it."""
    having = [name in one and one[name] is not None for one in examples]
    if not any(having):
        return []
    if not all(having):
        raise ValueError(f"example {having.index(False)} of the batch has no {name}")
    scores = [scores_in(example[name]) for example in examples]
    for row, (example, values) in enumerate(zip(examples, scores, strict=True)):
        if len(example["input_ids"]) != len(values):
            raise ValueError(
                f"example {row} of the batch has {len(example['input_ids'])} input_ids and "
                f"{len(values)} {name}"
            )
    return scores


def without_scores(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copied(value) for name, value in example.items() if name not in BESIDE}


def copied(value: Any) -> Any:
    """deepcopy, quick for the lists of numbers that most columns are."""
    if isinstance(value, list) and {*map(type, value)} <= {int, float}:
        return value.copy()
    return copy.deepcopy(value)


def scores_in(column: Any) -> Tensor:  # (T,)
    """None, which NaN becomes on its way through JSON, is NaN."""
    values = column if isinstance(column, Tensor) else np.array(column, dtype=np.float32)
    if values.ndim != 1:
        raise ValueError(f"a column is {column!r}, it must have a number for each token")
    return torch.as_tensor(values, dtype=torch.float32)


def marks_like(ids: Any, first: int) -> Any:
    """first, first + 1, ... in the container of `ids`."""
    marks = np.arange(first, first + len(ids))
    if isinstance(ids, Tensor):
        return torch.from_numpy(marks)
    return marks if isinstance(ids, np.ndarray) else marks.tolist()
