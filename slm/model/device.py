"""Where and how a model computes: the device, its name, the dtype of weights and of compute."""

import os
import platform
from collections.abc import Mapping

import torch

from slm.errors import UserError

# How a forward computes: the dtype of the weights. bf16-mixed is the trainer's, bf16 compute over
# float32 weights.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16-mixed": torch.float32}
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # set by torchrun, by srun


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (count := torch.cuda.device_count()) > 0:
        name = own_gpu(os.environ, count)
    try:
        return torch.empty(0, device=name).device  # a device that is not there says so here
    except (RuntimeError, AssertionError) as error:
        here = devices_here()
        if name in here:
            reason = str(error).splitlines()[0]
            raise UserError(f"device {name!r} cannot be used here: {reason}") from None
        raise UserError(
            f"device is {name!r}, and PyTorch finds none of that name here: {', '.join(here)}"
        ) from None


def own_gpu(environment: Mapping[str, str], count: int) -> str:
    """Of the processes that torchrun or srun started on this machine, each has its own.

    Where the scheduler shows a process its GPU alone, that is the one; where there are more
    processes than GPUs, they share.
    """
    named = [environment[name] for name in LOCAL_RANKS if name in environment]
    return f"cuda:{int(named[0]) % count}" if named and named[0].isdecimal() else "cuda"


def devices_here() -> list[str]:
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    others = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(["cuda", *gpus] if gpus else []), *others]


def computing(device: torch.device, dtype: str) -> torch.autocast:
    """The context of a forward with weights of DTYPES[dtype], as Lightning's."""
    is_mixed = dtype == "bf16-mixed"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_mixed, cache_enabled=False)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
