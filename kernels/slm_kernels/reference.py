"""The definition, in plain torch: autograd through all N x V logits. It judges everything else.

N tokens, D width, V vocabulary. It computes in float32 whatever the operands are (scores
from bfloat16 logits change which tokens are selected), and in float64 if they are float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_kernels.contracts import Head, TokenStats, compute_dtype


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
    want_correct: bool,
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
        correct=z.argmax(dim=1) == targets if want_correct else None,
    )


def weighted_sum(
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,), -1 where ignored
    token_weight: Tensor,  # (N,)
) -> Tensor:  # ()
    """Differentiable sum of token_weight * token_loss."""
    loss = F.cross_entropy(logits(hidden, head), targets, ignore_index=-1, reduction="none")
    return (token_weight * loss).sum()
