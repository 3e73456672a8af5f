"""Heads whose weight is a sharded DTensor, as FSDP2 leaves it outside its module's forward."""

from typing import Any, overload

import torch.distributed as dist
from torch import Tensor


@overload
def gathered(tensor: Tensor) -> Tensor: ...
@overload
def gathered(tensor: None) -> None: ...
def gathered(tensor: Tensor | None) -> Tensor | None:
    """The whole tensor on every rank; its gradient returns in the tensor's own placements.

    Each rank's gradient is of its own tokens, and data-parallel wrappers average: so does this.
    """
    if tensor is None or not dist.is_available():
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(tensor, DTensor):
        return tensor
    partial: Any = [Partial("avg")] * tensor.device_mesh.ndim
    return tensor.full_tensor(grad_placements=partial)
