"""The definition, in plain torch: autograd through all N x V logits. It judges everything else.

N tokens, D width, V vocabulary. An implementation is two functions with the signatures of
`token_stats` and `weighted_sum` below. It computes in float32 whatever the operands are (scores
from bfloat16 logits change which tokens are selected), and in float64 if they are float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """The output layer: z = logit_scale * (hidden @ weight.T + bias), then the soft cap."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


class TokenCrossEntropy(NamedTuple):
    """Per token, without gradient; zero and False where the target is ignored."""

    loss: Tensor  # (...), -log p(target), nats
    lse: Tensor  # (...), log of the sum of exp(logits)
    entropy: Tensor | None  # (...), of the predicted distribution, nats; None unless wanted
    correct: Tensor  # (...), bool: the target is the lowest index of the maximal logit


class TokenStats(NamedTuple):
    """What a forward pass keeps. lse is in two parts: z - row_max is exact where z - lse is not."""

    loss: Tensor  # (N,)
    row_max: Tensor  # (N,), maximal logit; 0 where ignored
    sum_exp: Tensor  # (N,), sum of exp(z - row_max); 1 where ignored
    entropy: Tensor | None  # (N,)
    correct: Tensor  # (N,) bool


def compute_dtype(operand: Tensor) -> torch.dtype:
    return torch.float64 if operand.dtype == torch.float64 else torch.float32


def logits(
    hidden: Tensor,  # (N, D)
    head: Head,
) -> Tensor:  # (N, V)
    dtype = compute_dtype(hidden)
    z = hidden.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        z = z + head.bias.to(dtype)
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def token_stats(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    want_entropy: bool,
) -> TokenStats:
    z = logits(hidden, head)
    valid = targets >= 0
    row_max = z.amax(dim=1)
    sum_exp = (z - row_max[:, None]).exp().sum(dim=1)
    entropy = torch.special.entr(z.softmax(dim=1)).sum(dim=1)
    return TokenStats(
        loss=F.cross_entropy(z, targets, ignore_index=-1, reduction="none"),
        row_max=row_max.where(valid, 0.0),
        sum_exp=sum_exp.where(valid, 1.0),
        entropy=entropy.where(valid, 0.0) if want_entropy else None,
        correct=z.argmax(dim=1) == targets,
    )


def weighted_sum(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
    stats: TokenStats,
) -> Tensor:  # ()
    """Differentiable sum of token_weight * token_loss. The definition needs no `stats`."""
    loss = F.cross_entropy(logits(hidden, head), targets, ignore_index=-1, reduction="none")
    return (token_weight * loss).sum()
