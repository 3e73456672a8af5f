"""Matrix products of the chunked implementation, of operands in its compute dtype.

On x86 torch.mm of float32 is MKL's, which is slow on other makers' processors; oneDNN, which torch
brings along for compiled models, is as exact and was faster on the AMD EPYC that it was tried on.
"""

from functools import cache

import torch
from torch import Tensor


def linear(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (v, D)
    bias: Tensor | None = None,  # (v,)
) -> Tensor:  # (R, v)
    """rows @ weight.T + bias, in the dtype of the operands, also under autocast."""
    if _is_onednn_better(rows):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    out = rows.new_empty(len(rows), len(weight))  # autocast leaves products with out= alone
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)


def _is_onednn_better(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and _has_onednn()


@cache
def _has_onednn() -> bool:
    """MKL to do better than, and the operator that torch.compile itself uses."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and hasattr(torch.ops.mkldnn, "_linear_pointwise")
