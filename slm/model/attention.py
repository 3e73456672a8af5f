"""Attention that is known: what a forward pass found, differentiated without finding it again.

Torch's fused attention of the CPU gives beside its output what its backward pass needs of it, one
number a query. Both are kept of all queries, and those of some are differentiated by the same
kernel. Other devices' kernels take no such pair with a mask for their rows: none is kept there.

Letters: B windows, T positions, H heads, d width of a head, W queries of a window.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slm.model.rows import Rows

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextmanager
def attention_through(function: Callable[..., Any]) -> Iterator[None]:
    """`function(own, ...)` in place of each attention function `own` of transformers."""
    registry: Any = ALL_ATTENTION_FUNCTIONS
    found = registry.get_interface

    def get_interface(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(function, found(name, default))

    registry.get_interface = get_interface
    try:
        yield
    finally:
        registry.get_interface = found


def attend(
    query: Tensor,  # (B, H, T, d)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor] | None:  # (B, H, T, d), (B, H, T)
    """What F.scaled_dot_product_attention gives and its logsumexp, where it is the CPU's kernel."""
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu") or dropout_p:
        return None
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    choice = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if choice != SDPBackend.FLASH_ATTENTION.value:
        return None
    mask = None if attn_mask is None else added(attn_mask, query)
    return FUSED(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)


def added(mask: Tensor, like: Tensor) -> Tensor:
    """As the kernel wants it."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)


class Attended(Function):
    """Attention of the rows' queries over all keys, of which the forward pass is known."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (B, H, W, d)
        key: Tensor,  # (B, H, T, d)
        value: Tensor,
        mask: Tensor,  # (B, 1 or H, W, T)
        scale: float | None,
        rows: Rows,
        out: Tensor,  # (B, H, T, d)
        logsumexp: Tensor,  # (B, H, T)
    ) -> Tensor:  # (B, H, W, d)
        index = rows.positions[:, None].expand(-1, query.shape[1], -1)  # (B, H, W)
        mine = out.gather(2, index[..., None].expand_as(query))
        # Padding is another row's query: infinite, so that its weights, which nothing needs, are 0.
        sums = logsumexp.gather(2, index).masked_fill_(~rows.asked[:, None], torch.inf)
        ctx.save_for_backward(query, key, value, added(mask, query), mine, sums)
        ctx.scale = scale
        return mine

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, mask, out, logsumexp = ctx.saved_tensors
        options = {"attn_mask": mask, "scale": ctx.scale}
        known = query, key, value, out, logsumexp, 0.0, False
        return *FUSED_BACKWARD(gradients[0].contiguous(), *known, **options), *[None] * 5
