"""Selective language modeling (Rho-1, arXiv 2404.07965) as a loss: needs torch and nothing else."""

from slm_kernels.contracts import TokenCrossEntropy
from slm_kernels.selection import max_selected, select_count, select_top_k
from slm_kernels.selective_cross_entropy import (
    SelectiveCrossEntropy,
    WeightedCrossEntropy,
    selective_cross_entropy,
    selective_cross_entropy_from_logits,
    token_cross_entropy,
    weighted_cross_entropy,
    weighted_cross_entropy_from_logits,
)

__all__ = [
    "SelectiveCrossEntropy",
    "TokenCrossEntropy",
    "WeightedCrossEntropy",
    "max_selected",
    "select_count",
    "select_top_k",
    "selective_cross_entropy",
    "selective_cross_entropy_from_logits",
    "token_cross_entropy",
    "weighted_cross_entropy",
    "weighted_cross_entropy_from_logits",
]
