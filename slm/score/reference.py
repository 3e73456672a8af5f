"""What is written down of a reference model: how it computes, and what that costs."""

from typing import Any

from slm.model.build import SelectiveLM
from slm.model.device import device_name
from slm.store.files import Json


def how_it_computes(config: Any, lm: SelectiveLM) -> Json:
    return {
        "dtype": config.dtype,
        "store_dtype": config.store_dtype,
        "attn_implementation": lm.model.config._attn_implementation,
        "device": lm.model.device.type,
    }


def forward_cost(lm: SelectiveLM, seconds: float, tokens: int, flops: float | None) -> Json:
    """flops: of a token"""
    return {
        "seconds": seconds,
        "tokens": tokens,
        "flops": None if flops is None else tokens * flops,
        "device": device_name(lm.model.device),
    }
