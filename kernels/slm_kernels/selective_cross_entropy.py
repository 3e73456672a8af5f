"""The public losses: check the input, run an implementation, select, divide once.

(...) stands for the token axes, (B, T) or (N,); D is the width, V the vocabulary. Losses are in
nats and float32 (float64 for float64 operands). Every function takes the head in the same words:

    bias            (V,) or None
    ignore_index    the target of a token that is not predicted
    logit_scale     z = logit_scale * (hidden @ weight.T + bias)
    softcap         then z = softcap * tanh(z / softcap), unless None
    implementation  "auto", "reference" (plain torch, all logits at once), "chunked" (torch, any
                    device) or "triton" (CUDA); auto takes triton where it can run, else chunked
    vocab_group     the ranks over which the rows of `weight` and `bias` are cut, in their order:
                    each passes its own, or a DTensor of them, and all pass the same `hidden` and
                    `targets`, as tensor-parallel models do. Logits are made of a rank's rows alone
                    ("chunked"); losses, choice and gradient are those of the whole head

Without it, `weight` and `bias` may be sharded DTensors of a data-parallel model: they are gathered,
and their gradient returns sharded in the same way, averaged over the ranks as such wrappers do.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from slm_kernels import checks, from_logits, ops, reference, vocabulary
from slm_kernels.contracts import Head, TokenCrossEntropy, TokenStats, compute_dtype
from slm_kernels.implementation import pick_implementation
from slm_kernels.selection import check_scope, check_select_ratio, max_selected, select_top_k
from slm_kernels.sharded import gathered


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


class WeightedCrossEntropy(NamedTuple):
    """Only `loss` carries gradient."""

    loss: Tensor  # ()
    token_loss: Tensor  # (...), nats; 0 where the target is ignored
    token_weight: Tensor  # (...), in the dtype of token_loss; 0 where the target is ignored
    entropy: Tensor | None = None  # (...), of the predicted distribution, nats; None unless wanted


class _Pass(NamedTuple):
    """A forward pass that has been made, and what its backward pass needs."""

    name: str
    hidden: Tensor  # (N, D)
    head: Head
    targets: Tensor  # (N,), -1 where ignored
    stats: TokenStats
    cache: tuple[Tensor, Tensor]
    known_sum: Tensor | None  # (), where the weights were known and the gradients are made

    def weighted_sum(
        self,
        token_weight: Tensor,  # (N,)
        capacity: int | None,
    ) -> Tensor:  # ()
        if self.known_sum is not None:
            return self.known_sum
        operands = (self.hidden, self.head, self.targets, token_weight)
        if self.name == "reference":
            return reference.weighted_sum(*operands)
        return ops.weighted_sum(*operands, self.stats, self.cache, capacity, self.name)


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
    vocab_group: ProcessGroup | None = None,
) -> TokenCrossEntropy:
    """Score tokens: -log p(target), lse, correctness and by wish entropy, without gradient.

    The loss is L_RM or L_theta of Rho-1 (arXiv 2404.07965, Eq 1). Ignored tokens have zeros and
    False; their forward pass is skipped. Raises ValueError as `selective_cross_entropy` does.
    """
    hidden, head = _operands(hidden, weight, bias, logit_scale, softcap, vocab_group)
    valid = _valid(targets, hidden.shape[:-1], head.vocab_size, ignore_index, hidden.device)
    stats = _forward(
        hidden, head, targets, valid, implementation, want_entropy=want_entropy, want_correct=True
    ).stats
    assert stats.correct is not None
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
    token_weight: Tensor | Callable[..., Tensor],  # (...), bool or floating point
    *,
    want_entropy: bool = False,
    denominator: float | Tensor | None = None,
    max_rows: int | None = None,
    logits_cache_bytes: int = 0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    vocab_group: ProcessGroup | None = None,
) -> WeightedCrossEntropy:
    """Sum of token_weight * token_loss over `denominator`, by default the weights' own sum.

    `token_weight` is a tensor, or a function that makes it of the token losses (...) between the
    forward and the backward pass: the door for selection rules of one's own. With `want_entropy`
    it is given the entropies of the predictions as well, a second argument. Weights may be
    negative; those of ignored tokens count for nothing, in the sum as well. They get no gradient.
    A token with weight 0 costs no backward arithmetic; give it the target `ignore_index` to skip
    its forward pass too. With no weight at all the loss is 0. A non-finite token_loss makes the
    loss non-finite, whatever its weight.

    How many tokens have a weight is read back from the device, unless `max_rows` says how many
    there are at most: then nothing is synchronised, and more of them are an error.
    `logits_cache_bytes`: see `selective_cross_entropy`.

    Raises ValueError as `selective_cross_entropy` does.
    """
    checks.check_denominator(denominator)
    checks.check_count("logits_cache_bytes", logits_cache_bytes)
    hidden, head = _operands(hidden, weight, bias, logit_scale, softcap, vocab_group)
    valid = _valid(targets, hidden.shape[:-1], head.vocab_size, ignore_index, hidden.device)
    known = None
    if not callable(token_weight):
        known = _row_weight(token_weight, targets, valid, max_rows, compute_dtype(hidden))
    done = _forward(
        hidden, head, targets, valid, implementation, None if want_entropy else known,
        want_entropy=want_entropy, cache_bytes=logits_cache_bytes,
    )  # fmt: skip
    seen = _seen(done.stats, targets.shape)
    if known is None:
        assert not isinstance(token_weight, Tensor), "a tensor is not callable"
        with torch.no_grad():
            made = token_weight(*seen)
        known = _row_weight(made, targets, valid, max_rows, compute_dtype(hidden))
    with _without_autocast(hidden):
        local_sum = done.weighted_sum(known, max_rows)
    return _weighted(local_sum, seen, known, denominator)


def weighted_cross_entropy_from_logits(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...), int64, already shifted
    token_weight: Tensor | Callable[..., Tensor],  # (...), bool or floating point
    *,
    want_entropy: bool = False,
    denominator: float | Tensor | None = None,
    ignore_index: int = -100,
) -> WeightedCrossEntropy:
    """`weighted_cross_entropy` for trainers that only expose logits.

    What `selective_cross_entropy_from_logits` says of them is true here.
    """
    checks.check_denominator(denominator)
    checks.check_logits(logits)
    valid = _valid(targets, logits.shape[:-1], logits.shape[-1], ignore_index, logits.device)
    rows, row_targets = _flatten(logits, targets, valid)
    with torch.no_grad():
        stats = from_logits.token_stats(rows, row_targets, want_entropy)
        seen = _seen(stats, targets.shape)
        made = token_weight(*seen) if callable(token_weight) else token_weight
    known = _row_weight(made, targets, valid, None, stats.loss.dtype)
    local_sum = from_logits.weighted_sum(rows, row_targets, known, stats)
    return _weighted(local_sum, seen, known, denominator)


def _seen(stats: TokenStats, shape: torch.Size) -> list[Tensor]:  # (...) each
    """Token losses, and where they were wanted the entropies."""
    wanted = (stats.loss,) if stats.entropy is None else (stats.loss, stats.entropy)
    return [column.view(shape) for column in wanted]


def _weighted(
    local_sum: Tensor,  # ()
    seen: list[Tensor],  # (...) each
    token_weight: Tensor,  # (N,)
    denominator: float | Tensor | None,
) -> WeightedCrossEntropy:
    if denominator is None:
        denominator = token_weight.sum()
    loss = _divide(local_sum, denominator, ~token_weight.any())
    token_loss, *entropy = seen
    return WeightedCrossEntropy(loss, token_loss, token_weight.view(token_loss.shape), *entropy)


@torch.no_grad()
def _row_weight(
    token_weight: Tensor,  # (...)
    targets: Tensor,  # (...)
    valid: Tensor,  # (...)
    max_rows: int | None,
    dtype: torch.dtype,
) -> Tensor:  # (N,), 0 where ignored
    valid = checks.check_token_weight(token_weight, targets, valid, max_rows)
    return token_weight.masked_fill(~valid, 0).reshape(-1).to(dtype)


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
    logits_cache_bytes: int = 0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    vocab_group: ProcessGroup | None = None,
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

    `logits_cache_bytes` buys time with memory: as many columns of exponentials as fit are kept for
    the backward pass, which else computes the selected rows' logits again. They have two bytes
    each (bfloat16 for bfloat16 operands, else float16; float64 for float64), so the gradients
    differ by that rounding; the losses and the selection do not.

    Raises ValueError, with both values, for: shapes, dtypes or devices that do not fit together;
    a select_ratio outside (0, 1]; an unknown scope or implementation; a global scope without a
    group; a target outside [0, V); a negative reference_loss, which is a log-probability passed
    by mistake. The last two are device assertions on an accelerator.
    """
    _check_selection(select_ratio, scope, group, denominator)
    checks.check_count("logits_cache_bytes", logits_cache_bytes)
    hidden, head = _operands(hidden, weight, bias, logit_scale, softcap, vocab_group)
    valid = _valid(targets, hidden.shape[:-1], head.vocab_size, ignore_index, hidden.device)
    valid = checks.check_reference_loss(reference_loss, targets, valid)
    everything = None
    if select_ratio == 1:
        everything = (valid & ~reference_loss.isnan()).reshape(-1).to(compute_dtype(hidden))
    done = _forward(
        hidden, head, targets, valid, implementation, everything, cache_bytes=logits_cache_bytes
    )
    with torch.no_grad():
        chosen = _choose(done.stats.loss, reference_loss, valid, select_ratio, scope, group)
        row_weight = chosen.selected.reshape(-1).to(done.stats.loss.dtype)
    with _without_autocast(hidden):
        local_sum = done.weighted_sum(row_weight, _capacity(targets, select_ratio, scope))
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
    valid = checks.check_reference_loss(reference_loss, targets, valid)
    rows, row_targets = _flatten(logits, targets, valid)
    with torch.no_grad():
        stats = from_logits.token_stats(rows, row_targets, want_entropy=False)
        chosen = _choose(stats.loss, reference_loss, valid, select_ratio, scope, group)
    row_weight = chosen.selected.reshape(-1).to(stats.loss.dtype)
    local_sum = from_logits.weighted_sum(rows, row_targets, row_weight, stats)
    return chosen._replace(loss=_mean(local_sum, chosen.num_selected, denominator, group))


def _forward(
    hidden: Tensor,  # (..., D)
    head: Head,
    targets: Tensor,  # (...)
    valid: Tensor,  # (...)
    implementation: str,
    known_weight: Tensor | None = None,  # (N,)
    want_entropy: bool = False,
    want_correct: bool = False,
    cache_bytes: int = 0,
) -> _Pass:
    name = pick_implementation(implementation, hidden)
    rows, row_targets = _flatten(hidden, targets, valid)
    if head.part is not None:
        if implementation not in ("auto", "chunked"):
            raise ValueError(f"with vocab_group implementation is chunked, got {implementation!r}")
        name, known_weight, row_targets = "chunked", None, head.part.local(row_targets)
    nothing = (hidden.new_empty(0, 0), hidden.new_empty(0, 0))
    trains = _trains(rows, head)
    with _without_autocast(hidden):
        if known_weight is not None and name == "chunked" and trains and _is_exact(rows):
            local_sum, stats = ops.known_sum(rows, head, row_targets, known_weight)
            return _Pass(name, rows, head, row_targets, stats, nothing, local_sum)
        with torch.no_grad():
            if name == "reference":
                stats = reference.token_stats(rows, head, row_targets, want_entropy, want_correct)
                return _Pass(name, rows, head, row_targets, stats, nothing, None)
            budget = cache_bytes if trains else 0  # else nobody reads it
            stats, *cache = ops.token_stats(
                rows, head, row_targets, want_entropy, want_correct, budget, name
            )
            if head.part is not None:
                stats = head.part.together(stats, row_targets)
    return _Pass(name, rows, head, row_targets, stats, (cache[0], cache[1]), None)


def _trains(hidden: Tensor, head: Head) -> bool:
    operands = (hidden, head.weight, head.bias)
    wanted = any(tensor is not None and tensor.requires_grad for tensor in operands)
    return wanted and torch.is_grad_enabled()


def _is_exact(hidden: Tensor) -> bool:
    """A gradient that is made before its scale is known would be rounded twice in 16 bits."""
    return hidden.dtype in (torch.float32, torch.float64)


def _capacity(
    targets: Tensor,  # (..., T)
    select_ratio: float,
    scope: str,
) -> int | None:
    """On a CPU asking how many there are costs nothing."""
    cpu = targets.device.type == "cpu"
    return None if cpu else max_selected(targets.shape, select_ratio, scope)


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
    vocab_group: ProcessGroup | None,
) -> tuple[Tensor, Head]:
    """Checked; under autocast cast as a linear layer would be, which leaves float64 alone."""
    if _is_autocast(hidden) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if vocab_group is None:
        head = Head(gathered(weight), gathered(bias), logit_scale, softcap)
    else:
        rows, biases = vocabulary.rows_here(weight), vocabulary.rows_here(bias)
        assert rows is not None, "a head has a weight"
        part = vocabulary.part_of(rows, vocab_group)
        head = Head(rows, biases, logit_scale, softcap, part)
        hidden = vocabulary.summed_gradient(hidden, vocab_group)
    checks.check_head(hidden, head)
    return hidden, head


def _is_autocast(operand: Tensor) -> bool:
    device_type = operand.device.type  # "meta" has no autocast, and cannot be asked
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _without_autocast(operand: Tensor) -> AbstractContextManager[Any]:
    if not _is_autocast(operand):
        return nullcontext()
    return torch.autocast(operand.device.type, enabled=False)


def _valid(
    targets: Tensor,  # (...)
    shape: torch.Size,
    vocab_size: int,
    ignore_index: int,
    device: torch.device,
) -> Tensor:  # (...), bool
    return checks.check_targets(targets, shape, vocab_size, ignore_index, device)


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
        loss=row_loss.new_full((), torch.nan),
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
    if isinstance(denominator, Tensor):
        divisor = denominator.to(local_sum.device, local_sum.dtype)
    else:  # filled on the device: a tensor made of a Python number would be copied to it
        divisor = local_sum.new_full((), denominator)
    return local_sum / divisor.masked_fill(nothing, 1.0)
