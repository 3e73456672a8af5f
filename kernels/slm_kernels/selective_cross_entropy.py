"""The public losses: check the input, run an implementation, select, divide once.

(...) stands for the token axes, (B, T) or (N,); D is the width, V the vocabulary. Losses are in
nats and float32 (float64 for float64 operands). Every function takes the head in the same words:

    bias            (V,) or None
    ignore_index    the target of a token that is not predicted
    logit_scale     z = logit_scale * (hidden @ weight.T + bias)
    softcap         then z = softcap * tanh(z / softcap), unless None
    implementation  "auto", "reference" (plain torch, all logits at once) or "chunked"
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from slm_kernels import checks, chunked, from_logits, reference
from slm_kernels.reference import Head, TokenCrossEntropy, TokenStats
from slm_kernels.selection import check_scope, check_select_ratio, select_top_k

logger = logging.getLogger("slm_kernels")


class SelectiveCrossEntropy(NamedTuple):
    """Only `loss` carries gradient. The counts are of this call, not of the group."""

    loss: Tensor  # ()
    token_loss: Tensor  # (...), nats; 0 where the target is ignored
    excess_loss: Tensor  # (...), token_loss - reference_loss, nats; NaN for what is no candidate
    selected: Tensor  # (...), bool
    threshold: Tensor  # (), or (...) without the last axis for "sequence": lowest selected excess;
    #                    inf where nothing was selected
    num_selected: Tensor  # (), int64
    num_candidates: Tensor  # (), int64: valid and with a reference loss
    num_valid: Tensor  # (), int64: target is not ignored


class Implementation(NamedTuple):
    token_stats: Callable[[Tensor, Head, Tensor, bool], TokenStats]
    weighted_sum: Callable[[Tensor, Head, Tensor, Tensor, TokenStats], Tensor]


IMPLEMENTATIONS = {
    "reference": Implementation(reference.token_stats, reference.weighted_sum),
    "chunked": Implementation(chunked.token_stats, chunked.weighted_sum),
}


def token_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...), int64, already shifted
    *,
    want_entropy: bool = False,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
) -> TokenCrossEntropy:
    """Score tokens: -log p(target), lse, correctness and by wish entropy, without gradient.

    The loss is L_RM or L_theta of Rho-1 (arXiv 2404.07965, Eq 1). Ignored tokens have zeros and
    False; their forward pass is skipped. Raises ValueError as `selective_cross_entropy` does.
    """
    engine = _implementation(implementation, hidden.device)
    hidden, head = _operands(hidden, weight, bias, logit_scale, softcap)
    valid = _valid(targets, hidden.shape[:-1], weight.shape[0], ignore_index, hidden.device)
    rows, row_targets = _flatten(hidden, targets, valid)
    with torch.no_grad(), _without_autocast(hidden):
        stats = engine.token_stats(rows, head, row_targets, want_entropy)
    return TokenCrossEntropy(
        loss=stats.loss.view(targets.shape),
        lse=(stats.row_max + stats.sum_exp.log()).view(targets.shape),
        entropy=None if stats.entropy is None else stats.entropy.view(targets.shape),
        correct=stats.correct.view(targets.shape),
    )


def weighted_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...), int64, already shifted
    token_weight: Tensor,  # (...), bool or floating point
    *,
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
) -> Tensor:  # ()
    """Sum of token_weight * token_loss over `denominator`, by default the weights' own sum.

    Weights may be negative; those of ignored tokens count for nothing, in the sum as well.
    `token_weight` gets no gradient. A token with weight 0 costs no backward arithmetic; give it
    the target `ignore_index` to skip its forward pass too. With no weight at all the loss is 0.
    A non-finite token_loss makes the loss non-finite, whatever its weight.

    Raises ValueError as `selective_cross_entropy` does.
    """
    checks.check_denominator(denominator)
    engine = _implementation(implementation, hidden.device)
    hidden, head = _operands(hidden, weight, bias, logit_scale, softcap)
    valid = _valid(targets, hidden.shape[:-1], weight.shape[0], ignore_index, hidden.device)
    checks.check_token_weight(token_weight, targets)
    rows, row_targets = _flatten(hidden, targets, valid)
    with _without_autocast(hidden):
        with torch.no_grad():
            stats = engine.token_stats(rows, head, row_targets, False)
            row_weight = token_weight.masked_fill(~valid, 0).reshape(-1).to(stats.loss.dtype)
        local_sum = engine.weighted_sum(rows, head, row_targets, row_weight, stats)
    if denominator is None:
        denominator = row_weight.sum()
    return _divide(local_sum, denominator, ~row_weight.any())


def selective_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...), int64, already shifted
    reference_loss: Tensor,  # (...), nats, >= 0, float32 or float64; NaN: no reference score
    *,
    select_ratio: float,
    scope: str = "batch",
    group: ProcessGroup | None = None,
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
) -> SelectiveCrossEntropy:
    """Cross-entropy of the `select_ratio` of tokens furthest above the reference (Rho-1, Eq 3-5).

    Candidates are the tokens that have a target and a reference loss. `select_top_k` takes the K
    with the highest token_loss - reference_loss, per `scope`; the loss is their summed token_loss
    divided by their number: in this call; or, with `group` and under any scope, in the whole
    group, times its size, because data-parallel wrappers average gradients. With `denominator`
    it is this call's sum / denominator, with no such factor, for gradient accumulation.

    Without a candidate the loss is 0 with zero gradients. Unselected tokens get exactly zero rows
    in the gradient of `hidden`. A non-finite token_loss, selected or not, makes the loss
    non-finite. Under autocast the operands are cast to its dtype; scores stay float32.

    Raises ValueError, with both values, for: shapes, dtypes or devices that do not fit together;
    a select_ratio outside (0, 1]; an unknown scope or implementation; a global scope without a
    group; a target outside [0, V); a negative reference_loss, which is a log-probability passed
    by mistake. The last two are device assertions on an accelerator.
    """
    _check_selection(select_ratio, scope, group, denominator)
    engine = _implementation(implementation, hidden.device)
    hidden, head = _operands(hidden, weight, bias, logit_scale, softcap)
    valid = _valid(targets, hidden.shape[:-1], weight.shape[0], ignore_index, hidden.device)
    checks.check_reference_loss(reference_loss, targets, valid)
    rows, row_targets = _flatten(hidden, targets, valid)
    with _without_autocast(hidden):
        with torch.no_grad():
            stats = engine.token_stats(rows, head, row_targets, False)
            chosen = _choose(stats.loss, reference_loss, valid, select_ratio, scope, group)
        row_weight = chosen.selected.reshape(-1).to(stats.loss.dtype)
        local_sum = engine.weighted_sum(rows, head, row_targets, row_weight, stats)
    return chosen._replace(loss=_mean(local_sum, chosen.num_selected, denominator, group))


def selective_cross_entropy_from_logits(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...), int64, already shifted
    reference_loss: Tensor,  # (...), nats, >= 0, float32 or float64; NaN: no reference score
    *,
    select_ratio: float,
    scope: str = "batch",
    group: ProcessGroup | None = None,
    denominator: float | Tensor | None = None,
    ignore_index: int = -100,
) -> SelectiveCrossEntropy:
    """`selective_cross_entropy` for trainers that only expose logits.

    It saves no memory, and logits that are bfloat16 already have lost what decides close
    selections: prefer the form that takes `hidden`. Raises ValueError as that does.
    """
    _check_selection(select_ratio, scope, group, denominator)
    checks.check_logits(logits)
    valid = _valid(targets, logits.shape[:-1], logits.shape[-1], ignore_index, logits.device)
    checks.check_reference_loss(reference_loss, targets, valid)
    rows, row_targets = _flatten(logits, targets, valid)
    with torch.no_grad():
        stats = from_logits.token_stats(rows, row_targets)
        chosen = _choose(stats.loss, reference_loss, valid, select_ratio, scope, group)
    row_weight = chosen.selected.reshape(-1).to(stats.loss.dtype)
    local_sum = from_logits.weighted_sum(rows, row_targets, row_weight, stats)
    return chosen._replace(loss=_mean(local_sum, chosen.num_selected, denominator, group))


def _implementation(name: str, device: torch.device) -> Implementation:
    if name != "auto" and name not in IMPLEMENTATIONS:
        choices = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation must be one of {choices}, got {name!r}")
    name = "chunked" if name == "auto" else name
    _say_once(name, device.type)
    return IMPLEMENTATIONS[name]


@cache
def _say_once(name: str, device_type: str) -> None:
    logger.info("cross-entropy on %s runs the implementation %r", device_type, name)


def _check_selection(
    select_ratio: float,
    scope: str,
    group: ProcessGroup | None,
    denominator: float | Tensor | None,
) -> None:
    check_select_ratio(select_ratio)
    check_scope(scope, group)
    checks.check_denominator(denominator)


def _operands(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Head]:
    """Checked; under autocast cast as a linear layer would be, which leaves float64 alone."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    head = Head(weight, bias, logit_scale, softcap)
    checks.check_head(hidden, head)
    return hidden, head


def _without_autocast(operand: Tensor) -> torch.autocast:
    return torch.autocast(operand.device.type, enabled=False)


def _valid(
    targets: Tensor,  # (...)
    shape: torch.Size,
    vocab_size: int,
    ignore_index: int,
    device: torch.device,
) -> Tensor:  # (...), bool
    checks.check_targets(targets, shape, vocab_size, ignore_index, device)
    return targets != ignore_index


def _flatten(
    features: Tensor,  # (..., D) or (..., V)
    targets: Tensor,  # (...)
    valid: Tensor,  # (...)
) -> tuple[Tensor, Tensor]:  # (N, D) or (N, V), and (N,) with -1 where ignored
    return features.reshape(-1, features.shape[-1]), targets.where(valid, -1).reshape(-1)


def _choose(
    row_loss: Tensor,  # (N,)
    reference_loss: Tensor,  # (...)
    valid: Tensor,  # (...)
    select_ratio: float,
    scope: str,
    group: ProcessGroup | None,
) -> SelectiveCrossEntropy:
    """Everything but the loss, which is NaN here until the caller fills it in."""
    token_loss = row_loss.view(valid.shape)
    candidates = valid & ~reference_loss.isnan()
    excess_loss = (token_loss - reference_loss).masked_fill(~candidates, torch.nan)
    selected = select_top_k(excess_loss, candidates, select_ratio, scope=scope, group=group)
    return SelectiveCrossEntropy(
        loss=row_loss.new_tensor(torch.nan),
        token_loss=token_loss,
        excess_loss=excess_loss,
        selected=selected,
        threshold=_threshold(excess_loss, selected, scope, group),
        num_selected=selected.sum(),
        num_candidates=candidates.sum(),
        num_valid=valid.sum(),
    )


def _threshold(
    excess_loss: Tensor,  # (..., T)
    selected: Tensor,  # (..., T)
    scope: str,
    group: ProcessGroup | None,
) -> Tensor:  # () or (...)
    scores = excess_loss.where(selected, torch.inf)
    if scope == "sequence":
        return _lowest(scores)
    lowest = _lowest(scores.reshape(-1))
    if scope == "global":
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    return lowest


def _lowest(scores: Tensor) -> Tensor:
    # amin has no answer for an empty axis, which is what a call without tokens has.
    return torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), torch.inf)], dim=-1).amin(-1)


def _mean(
    local_sum: Tensor,  # ()
    num_selected: Tensor,  # ()
    denominator: float | Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:  # ()
    nothing = num_selected == 0
    if denominator is not None:
        return _divide(local_sum, denominator, nothing)
    if group is None:
        return _divide(local_sum, num_selected, nothing)
    in_group = num_selected.clone()
    dist.all_reduce(in_group, group=group)
    return _divide(local_sum * dist.get_world_size(group), in_group, nothing)


def _divide(
    local_sum: Tensor,  # ()
    denominator: float | Tensor,
    nothing: Tensor,  # (), bool: no token has a weight, and 0 / 0 shall be 0
) -> Tensor:  # ()
    divisor = torch.as_tensor(denominator, dtype=local_sum.dtype, device=local_sum.device)
    return local_sum / divisor.masked_fill(nothing, 1.0)
