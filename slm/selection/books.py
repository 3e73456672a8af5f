"""The books of a step: sums by name, and the means, quantiles and rates that are made of them.

Trainer and doors add up the `step_sums` of micro-batches, sum them over ranks, and read `means`.
Quantiles and rates of the sources are of one rank's tokens of one optimizer step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slm.store.windows import Windows

SUMS: tuple[str, ...] = (
    "loss_weighted",  # nats, token_weight * token_loss
    "loss_selected",  # nats, over selected tokens
    "loss_valid",  # nats, over every target
    "loss_scored",  # nats, over tokens with a reference score
    "num_selected",
    "num_trained",  # with a weight, selected or not
    "num_valid",
    "reference_loss",  # nats, over tokens with a reference score
    "reference_loss_selected",
    "num_scored",
    "num_below_reference",  # excess_loss < 0
    "weight",  # sum of the token weights
    "weight_squared",
)
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class TokenRecord(NamedTuple):
    """What one micro-batch on this rank did, token by token."""

    window: Tensor  # (B,)
    valid: Tensor  # (B, T)
    selected: Tensor  # (B, T)
    token_loss: Tensor  # (B, T) nats
    reference_loss: Tensor | None  # (B, T) nats, NaN: no score
    token_weight: Tensor  # (B, T)


class StepResult(NamedTuple):
    """Sums over one optimizer step, all ranks, and what the update looked like."""

    sums: dict[str, float]
    divided_by: float  # the loss's denominator
    select_ratio: float | None  # asked for at this step; None: the rule has none
    threshold: float | None  # lowest selected score of this rank's last micro-batch; with
    #                          scope=sequence the mean over its windows; None: no rule for it
    grad_norm: float
    tokens: list[TokenRecord]  # of this rank


# ---- sums ---------------------------------------------------------------------------------------


def no_sums(device: torch.device) -> Tensor:  # (len(SUMS),)
    return torch.zeros(len(SUMS), dtype=sum_dtype(device), device=device)


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPU has no float64


@torch.no_grad()
def step_sums(record: TokenRecord) -> Tensor:  # (len(SUMS),)
    """What one micro-batch adds. No synchronisation, which indexing with a mask would be."""
    valid, selected, loss = record.valid, record.selected, record.token_loss
    dtype = sum_dtype(loss.device)
    unscored = torch.full_like(loss, torch.nan)
    reference = unscored if record.reference_loss is None else record.reference_loss
    scored = valid & ~reference.isnan()
    token_weight = record.token_weight.to(dtype)

    def total(values: Tensor, mask: Tensor) -> Tensor:  # ()
        return values.to(dtype).masked_fill(~mask, 0.0).sum()

    terms = {
        "loss_weighted": total(token_weight * loss, valid),
        "loss_selected": total(loss, selected),
        "loss_valid": total(loss, valid),
        "loss_scored": total(loss, scored),
        "num_selected": selected.sum(),
        "num_trained": (token_weight != 0).sum(),
        "num_valid": valid.sum(),
        "reference_loss": total(reference, scored),
        "reference_loss_selected": total(reference, scored & selected),
        "num_scored": scored.sum(),
        "num_below_reference": (scored & (loss < reference)).sum(),
        "weight": token_weight.sum(),
        "weight_squared": (token_weight**2).sum(),
    }
    return torch.stack([terms[name].to(dtype) for name in SUMS])


def named(sums: Sequence[float]) -> dict[str, float]:
    return dict(zip(SUMS, sums, strict=True))


# ---- means --------------------------------------------------------------------------------------


def means(sums: dict[str, float]) -> dict[str, float]:
    """Per token, losses in nats; what has no tokens to be a mean of is left out."""
    found: dict[str, float] = {}
    valid, selected, scored = sums["num_valid"], sums["num_selected"], sums["num_scored"]

    def mean(name: str, total: float, count: float) -> None:
        if count > 0:
            found[name] = total / count

    mean("loss_all", sums["loss_valid"], valid)
    mean("loss_selected", sums["loss_selected"], selected)
    mean("loss_unselected", sums["loss_valid"] - sums["loss_selected"], valid - selected)
    mean("kept_frac", selected, valid)
    mean("scored_frac", scored, valid)
    mean("weight_mean", sums["weight"], valid)
    # Kish's effective number: so many tokens of equal weight would vary as little.
    mean("effective_frac", sums["weight"] ** 2, sums["weight_squared"] * valid)
    if scored > 0:
        reference, reference_selected = sums["reference_loss"], sums["reference_loss_selected"]
        mean("reference_loss", reference, scored)
        mean("reference_loss_selected", reference_selected, selected)
        mean("excess_mean", sums["loss_scored"] - reference, scored)
        mean("excess_mean_selected", sums["loss_selected"] - reference_selected, selected)
        mean("below_reference_frac", sums["num_below_reference"], scored)
    return found


def loss_metrics(result: StepResult) -> dict[str, float]:
    """Of the trainer, over one optimizer step; losses as train/, what the selection does as slm/"""
    metrics = {"train/loss": result.sums["loss_weighted"] / result.divided_by}
    for name, value in means(result.sums).items():
        if name != "scored_frac":  # every target of a corpus has a score, or none has
            metrics[("train/" if name.startswith("loss") else "slm/") + name] = value
    if result.select_ratio is not None:
        metrics["slm/select_ratio"] = result.select_ratio
    if result.threshold is not None:
        metrics["slm/threshold"] = result.threshold
    num_selected = result.sums["num_selected"]
    return metrics | {"slm/num_selected": num_selected, "train/grad_norm": result.grad_norm}


def mean_threshold(threshold: Tensor | None) -> float | None:  # (), or (B,) with scope=sequence
    """Mean over the windows where something was selected; infinite in the others."""
    if threshold is None:
        return None
    finite = threshold[threshold.isfinite()]
    return finite.mean().item() if len(finite) else None


# ---- token by token -----------------------------------------------------------------------------


def token_metrics(tokens: Sequence[TokenRecord]) -> dict[str, float]:
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
    ordered = values.to(sum_dtype(values.device)).sort().values
    place = torch.tensor(shares, dtype=ordered.dtype, device=values.device) * (len(values) - 1)
    low, high = ordered[place.floor().long()], ordered[place.ceil().long()]
    return (low + (high - low) * place.frac()).tolist()


def source_metrics(tokens: Sequence[TokenRecord], windows: Windows) -> dict[str, float]:
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
