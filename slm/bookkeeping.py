"""What a selection does, token by token: quantiles of the losses, keep rates of the sources.

All of it is of this rank's tokens of one optimizer step, computed only for steps that are logged.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slm.data import Windows

if TYPE_CHECKING:
    from slm.module import TokenRecord

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def token_metrics(tokens: "Sequence[TokenRecord]") -> dict[str, float]:
    """slm/<quantity>_<quantile>_<set> in nats: token, reference and excess loss, on both sets."""
    columns = {"token_loss": torch.cat([part.token_loss for part in tokens])}
    if tokens[0].reference_loss is not None:
        reference = torch.cat([given(part.reference_loss) for part in tokens])
        columns |= {
            "reference_loss": reference,
            "excess_loss": columns["token_loss"] - reference,
        }
    valid = torch.cat([part.valid for part in tokens])
    selected = torch.cat([part.selected for part in tokens])
    sets = {"selected": valid & selected, "unselected": valid & ~selected}
    metrics = {}
    for set_name, mask in sets.items():
        for column, values in columns.items():
            found = quantiles(values[mask], list(QUANTILES.values()))
            names = [f"slm/{column}_{name}_{set_name}" for name in QUANTILES]
            metrics |= dict(zip(names, found, strict=False))
    return metrics


def given(values: Tensor | None) -> Tensor:
    assert values is not None, "some micro-batches of a step have references and others have not"
    return values


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Interpolated linearly, as in NumPy; none of none. torch.quantile stops at 2^24 values."""
    if not len(values):
        return []
    ordered = values.double().sort().values
    place = torch.tensor(shares, dtype=torch.float64, device=values.device) * (len(values) - 1)
    low, high = ordered[place.floor().long()], ordered[place.ceil().long()]
    return (low + (high - low) * place.frac()).tolist()


def source_metrics(tokens: "Sequence[TokenRecord]", windows: Windows) -> dict[str, float]:
    """slm/kept_frac/<source> and slm/weight_mean/<source>, over the targets of a source."""
    names = windows.corpus.manifest["sources"]
    numbers = torch.cat([part.window for part in tokens]).cpu().numpy()
    found = windows.sources(numbers)
    valid = torch.cat([part.valid for part in tokens]).cpu().numpy()
    selected = torch.cat([part.selected for part in tokens]).cpu().numpy()
    total = np.bincount(found[valid], minlength=len(names))
    kept = np.bincount(found[selected], minlength=len(names))
    weights = torch.cat([part.token_weight for part in tokens]).double().cpu().numpy()
    weight = np.bincount(found.ravel(), weights.ravel(), minlength=len(names))
    columns = {"kept_frac": kept, "weight_mean": weight}
    return {
        f"slm/{column}/{name}": float(sums[i] / total[i])
        for column, sums in columns.items()
        for i, name in enumerate(names)
        if total[i]
    }
