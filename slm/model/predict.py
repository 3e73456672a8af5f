"""What a model says of every target of a batch, column by column (slm.store.columns)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slm.model.build import SelectiveLM
from slm.store.columns import Column
from slm.store.windows import IGNORE_INDEX, Batch


@torch.no_grad()
def predicted(
    lm: SelectiveLM, batch: Batch, columns: Sequence[Column]
) -> dict[str, Tensor]:  # (B, T) each
    """By the keys of the columns; NaN where there is no target."""
    output = lm(batch, **{option: True for column in columns for option in column.asks})
    dead = batch["targets"] == IGNORE_INDEX
    return {
        column.key: column.produce(output, batch, lm).masked_fill(dead, torch.nan)
        for column in columns
        if column.produce is not None
    }
