"""What a caller can get wrong, each said in one sentence with both values."""

import math

import torch
from torch import Tensor

from slm_kernels.contracts import Head
from slm_kernels.ops import refuse

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    hidden: Tensor,  # (..., D)
    head: Head,
) -> None:
    weight, bias = head.weight, head.bias
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (..., D) and weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    _check_same_kind("weight", weight, hidden)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
        _check_same_kind("bias", bias, hidden)
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden must be one of {', '.join(map(str, FLOATS))}, got {hidden.dtype}")
    if not math.isfinite(head.logit_scale):
        raise ValueError(f"logit_scale must be finite, got {head.logit_scale}")
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {head.softcap}")


def _check_same_kind(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and {name} must have one dtype outside autocast, got {hidden.dtype} and "
            f"{tensor.dtype}"
        )
    check_device("hidden", hidden, name, tensor)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {tensor.device} and {other.device}"
        )


def check_logits(logits: Tensor) -> None:
    if logits.ndim < 2:
        raise ValueError(f"logits must be (..., V), got {tuple(logits.shape)}")
    if logits.dtype not in FLOATS:
        raise ValueError(f"logits must be one of {', '.join(map(str, FLOATS))}, got {logits.dtype}")


def check_targets(
    targets: Tensor,  # (...)
    shape: torch.Size,
    vocab_size: int,
    ignore_index: int,
    device: torch.device,
) -> Tensor:  # (...), bool: not ignored
    if targets.shape != shape:
        raise ValueError(f"targets must be {tuple(shape)}, got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(
            f"targets and hidden must be on one device, got {targets.device}, {device}"
        )
    outside = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    return refuse(
        targets != ignore_index,
        outside,
        targets,
        f"targets must lie in [0, {vocab_size}) or be ignore_index {ignore_index}",
    )


def check_reference_loss(
    reference_loss: Tensor,  # (...)
    targets: Tensor,  # (...)
    valid: Tensor,  # (...)
) -> Tensor:  # valid
    if not isinstance(reference_loss, Tensor):
        raise ValueError(f"reference_loss must be a tensor, got {reference_loss!r}")
    if reference_loss.shape != targets.shape:
        raise ValueError(
            f"reference_loss must be {tuple(targets.shape)} as targets, got "
            f"{tuple(reference_loss.shape)}"
        )
    if reference_loss.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"reference_loss must be float32 or float64, got {reference_loss.dtype}")
    check_device("reference_loss", reference_loss, "targets", targets)
    return refuse(
        valid,
        valid & (reference_loss < 0),
        reference_loss,
        "reference_loss must be >= 0 (it looks as if log-probabilities were passed: pass "
        "-reference_logprob)",
    )


def check_token_weight(
    token_weight: Tensor,  # (...)
    targets: Tensor,  # (...)
    valid: Tensor,  # (...)
    max_rows: int | None,
) -> Tensor:  # valid
    if not isinstance(token_weight, Tensor):
        raise ValueError(f"token_weight must be or make a tensor, got {token_weight!r}")
    if token_weight.shape != targets.shape:
        raise ValueError(
            f"token_weight must be {tuple(targets.shape)} as targets, got "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.dtype != torch.bool and not token_weight.is_floating_point():
        raise ValueError(f"token_weight must be bool or floating point, got {token_weight.dtype}")
    check_device("token_weight", token_weight, "targets", targets)
    if max_rows is None:
        return valid
    check_count("max_rows", max_rows)
    weighted = (valid & (token_weight != 0)).sum()
    message = f"max_rows is {max_rows}, more tokens have a weight"
    return refuse(valid, weighted > max_rows, weighted, message)


def check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")


def check_denominator(denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            raise ValueError(
                f"denominator must be a number or a 0-d tensor, got {tuple(denominator.shape)}"
            )
    elif denominator is not None and not 0 <= denominator < math.inf:
        raise ValueError(f"denominator must be finite and >= 0, got {denominator}")
