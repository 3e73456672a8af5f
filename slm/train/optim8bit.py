"""AdamW whose moments have 8 bits each: `optimizer=adamw8bit`, by bitsandbytes.

In blocks of 256 with a scale each (Dettmers et al., arXiv 2110.02861): two bytes a parameter in
place of eight. Parameters of fewer elements than LEAST on a rank keep float32, and are AdamW's.
Under trainer=fsdp a rank has the blocks of its shards.

A checkpoint has the moments in float32, as AdamW's has them: either optimizer goes on from the
other's, on any number of ranks. Written and read back they are rounded once more, so they are at
that moment in memory too: a run that goes on is the uninterrupted one, bit for bit.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.adamw import adamw as update_whole

from slm.model.sharded import local
from slm.train.optim import decayed

BLOCK = 256  # of bitsandbytes' kernel
LEAST = 4096
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign


class Packed(NamedTuple):
    """Of a rank's n elements."""

    codes: Tensor  # uint8, of their shape
    scales: Tensor  # (ceil(n / BLOCK),) float32


def adamw8bit(
    module: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> "AdamW8bit":
    """Vectors (norms, biases) get no weight decay."""
    return AdamW8bit(decayed(module, weight_decay), lr=lr, betas=(betas[0], betas[1]), eps=eps)


class AdamW8bit(AdamW):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, local(parameter.grad), group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, own = self.state[parameter], local(parameter)
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= packed(parameter, {name: torch.zeros_like(parameter) for name in MOMENTS})
        mean, square = (state[name] for name in MOMENTS)
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        if not isinstance(mean, Packed):
            update_whole(
                *([own], [gradient], [local(mean)], [local(square)], [], [state["step"]]),
                foreach=False,
                **{"amsgrad": False, "maximize": False, "lr": group["lr"], "eps": group["eps"]},
                **{"beta1": beta1, "beta2": beta2, "weight_decay": decay},
            )
            return
        state["step"] += 1
        kernels().optimizer_update_8bit_blockwise(
            *("adam", gradient, own, mean.codes, square.codes, beta1, beta2, 0.0, 0.0),
            *(group["eps"], int(state["step"]), group["lr"]),
            *(code(True, own.device), code(False, own.device), mean.scales, square.scales, decay),
        )

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        for number, parameter in enumerate(self._parameters()):
            if number in saved["state"]:
                whole = opened(parameter, self.state[parameter])
                saved["state"][number] = whole
                self.state[parameter] = packed(parameter, whole)
        return saved

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for parameter in self._parameters():
            if parameter in self.state:
                self.state[parameter] = packed(parameter, self.state[parameter])

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])


def packed(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    if local(parameter).numel() < LEAST:
        return dict(state)
    return {
        name: pack(local(value), MOMENTS[name]) if name in MOMENTS else value
        for name, value in state.items()
    }


def pack(values: Tensor, signed: bool) -> Packed:
    codes, found = kernels().quantize_blockwise(
        values.contiguous(), code=code(signed, values.device), blocksize=BLOCK
    )
    return Packed(codes, found.absmax)


def opened(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """In float32, of the parameter's shape and in its shards."""
    return {
        name: like(parameter, unpack(value, MOMENTS[name])) if isinstance(value, Packed) else value
        for name, value in state.items()
    }


def unpack(value: Packed, signed: bool) -> Tensor:
    how = {"code": code(signed, value.codes.device), "blocksize": BLOCK}
    return kernels().dequantize_blockwise(value.codes, absmax=value.scales, **how)


def like(parameter: Tensor, mine: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return mine
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(mine, *where, run_check=False, **whole)


@cache
def kernels() -> Any:
    """On some CPUs bitsandbytes fetches code for its 4-bit products from the hub as it is imported,
    where the package `kernels` is installed, and else says that it is not: neither is wanted."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    before = {name: module for name, module in sys.modules.items() if name == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        return import_module("bitsandbytes.functional")
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)


@cache
def code(signed: bool, device: torch.device) -> Tensor:  # (256,) float32
    """What the codes mean, of a scale."""
    return kernels().create_dynamic_map(signed=signed).to(device)
