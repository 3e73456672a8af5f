"""AdamW with weight decay on matrices only; linear warm-up, then a cosine or a rate that stays."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Vectors (norms, biases) get no weight decay.

    foreach, fused: all parameters in few kernels, at most one of them; None: as torch does
    """
    groups, rates = decayed(module, weight_decay), (betas[0], betas[1])
    return torch.optim.AdamW(groups, lr=lr, betas=rates, eps=eps, foreach=foreach, fused=fused)


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, then vectors, which have none."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def warmup_cosine(
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    *,
    warmup_fraction: float,
    final_fraction: float,
) -> LambdaLR:
    """The rate rises over warmup_fraction of the steps, then falls to final_fraction of its peak.

    The last step of the warm-up has the peak, the last of the run the final rate.
    """
    warmup = max(1, round(warmup_fraction * num_steps))

    def factor(steps_before: int) -> float:
        step = steps_before + 1
        if step <= warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def warmup_stable_decay(
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    *,
    warmup_steps: int,
    decay_fraction: float,
    final_fraction: float,
) -> LambdaLR:
    """The rate rises over warmup_steps, stays, and falls over the last decay_fraction of the steps.

    It falls linearly, to final_fraction of its peak in the last step. What comes before the decay
    does not depend on num_steps, so a run can be made longer from there.
    """
    decay = round(decay_fraction * num_steps)

    def factor(steps_before: int) -> float:
        step = steps_before + 1
        left = max(0, num_steps - step)
        if step <= warmup_steps:
            return step / warmup_steps
        return 1.0 if left >= decay else final_fraction + (1 - final_fraction) * left / decay

    return LambdaLR(optimizer, factor)
