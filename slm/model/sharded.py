"""A model in shards over the ranks of a data-parallel mesh (FSDP2), within a tensor-parallel one.

Built without weights (`without_weights`), cut (`shard`), filled from a folder's safetensors, each
rank reading its own rows (`fill_from`), or from one whole model on rank 0 (`deal_out`), and put
together again in rank 0's host memory (`gathered`). No device ever holds more than its shards and
the layer that is computed.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer as Layer

from slm.errors import UserError
from slm.model.parallel import share_out
from slm.store.hub import FOLDER

BUILDING = ContextVar("BUILDING", default=False)


class Cut(NamedTuple):
    """How a model is cut and computed."""

    mesh: DeviceMesh  # of one dimension
    dtype: torch.dtype | None = None  # that weights are gathered and computed in; None: their own
    cpu_offload: bool = False  # shards in host memory
    reshard: bool = True  # a layer's weights are gathered again for its backward pass
    within: DeviceMesh | None = None  # the other dimension: over it each layer is shared out

    @property
    def device(self) -> torch.device:
        """Where shards are."""
        kind = "cpu" if self.cpu_offload else self.mesh.device_type
        return torch.device(kind)


# ---- built and cut ------------------------------------------------------------------------------


@contextmanager
def without_weights() -> Iterator[None]:
    """Parameters that are made here have a shape and no memory; buffers have their values."""
    own: Any = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        own(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    token = BUILDING.set(True)
    try:
        yield
    finally:
        BUILDING.reset(token)
        nn.Module.register_parameter = own  # type: ignore[method-assign]


def is_building() -> bool:
    return BUILDING.get()


def outline(
    where: Mapping[str, Any],
    attn_implementation: str | None,
    config: PreTrainedConfig | None = None,
    **how: Any,
) -> PreTrainedModel:
    """What from_pretrained gives, but for the weights."""
    config = config or AutoConfig.from_pretrained(**where, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=False,
    )
    with suppress(OSError):  # a folder need not have one
        model.generation_config = GenerationConfig.from_pretrained(where[FOLDER])
    return model


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Its outermost layers; none where transformers names none."""
    names = set(model._no_split_modules or ())
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        is_layer = isinstance(module, Layer) or type(module).__name__ in names
        if is_layer and id(module) not in inside:
            found.append(module)
            inside.update(id(part) for part in module.modules())
    return found


def shard(lm: nn.Module, model: PreTrainedModel, cut: Cut) -> None:
    """Cut each layer of `model` and the rest of `lm`, in place. Weights have memory afterwards, and
    no values where they had none."""
    if cut.within is not None:
        share_out(model, cut.within)
    # The batch has numbers of its own, which are not rounded: only layers cast what they are given.
    inner = MixedPrecisionPolicy(cut.dtype, reduce_dtype=cut.dtype and torch.float32)
    outer = MixedPrecisionPolicy(inner.param_dtype, inner.reduce_dtype, cast_forward_inputs=False)
    pinned = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    offload = pinned if cut.cpu_offload else OffloadPolicy()
    same: dict[str, Any] = {"mesh": cut.mesh, "offload_policy": offload}
    for layer in layers_of(model):
        fully_shard(layer, **same, mp_policy=inner, reshard_after_forward=cut.reshard)
    fully_shard(lm, **same, mp_policy=outer, reshard_after_forward=cut.reshard)
    device = torch.device(cut.mesh.device_type)
    kept = [(m, name, b) for m in lm.modules() for name, b in m._buffers.items() if b is not None]
    if any(parameter.is_meta for parameter in lm.parameters()):
        lm.to_empty(device=cut.device)
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to(device)


def is_cut(lm: nn.Module) -> bool:
    return isinstance(lm, FSDPModule)


@contextmanager
def root_gathered(lm: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """The weights outside of layers whole, so that a part of `lm` can be called by itself."""
    if not is_cut(lm):
        yield
        return
    with torch.no_grad():
        lm(batch)  # so that it is the root, and not the layer that is called first
    lm.unshard()
    try:
        yield
    finally:
        lm.reshard()


@contextmanager
def refused_together() -> Iterator[None]:
    """What a rank refuses ends all of them, and rank 0 alone says it."""
    refusal = None
    try:
        yield
    except UserError as error:
        refusal = str(error)
    for text in filter(None, together(refusal)):
        raise UserError(text) if dist.get_rank() == 0 else SystemExit(1)


def together(value: Any) -> list[Any]:
    """Of every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shards_of(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its parameters, DTensors, by name."""
    return lm.named_parameters()


def saved_values(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its parameters, those that are tied once, and the buffers that a file of it has."""
    yield from lm.named_parameters()
    names = lm.state_dict().keys()
    yield from ((name, buffer) for name, buffer in lm.named_buffers() if name in names)


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- filled -------------------------------------------------------------------------------------


@torch.no_grad()
def deal_out(lm: nn.Module, whole: nn.Module | None) -> None:
    """Fill the shards of `lm` from `whole`, which rank 0 has: a tensor at a time, and `whole` is
    empty afterwards."""
    theirs = {} if whole is None else dict(whole.named_parameters())
    for name, mine in shards_of(lm):
        full = torch.empty(mine.shape, dtype=mine.dtype, device=mine.device_mesh.device_type)
        if whole is not None:
            full.copy_(theirs[name])
            theirs[name].data = torch.empty(0)
        dist.broadcast(full, 0)
        local(mine).copy_(part_of(full, mine))
    values = {} if whole is None else dict(whole.named_buffers())
    for name, buffer in lm.named_buffers():
        if whole is not None:
            buffer.copy_(values[name])
        dist.broadcast(buffer, 0)


def weights_in(folder: Path, lm: nn.Module) -> dict[str, Path] | None:
    """The file of each parameter and saved buffer of `lm`, where the folder's safetensors have them
    all, by their own names and in their own shapes; else None: transformers must read it."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
            found |= {name: (path, shape) for name, shape in shapes.items()}
    named = {name.removeprefix("model."): value for name, value in saved_values(lm)}
    fits = all(name in found and found[name][1] == list(p.shape) for name, p in named.items())
    return {name: found[name][0] for name in named} if fits else None


@torch.no_grad()
def fill_from(files: Mapping[str, Path], lm: nn.Module) -> None:
    """Each rank reads its own rows of every tensor, and no more of the file."""
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name, mine in saved_values(lm):
                if files[short := name.removeprefix("model.")] == path:
                    is_whole = not isinstance(mine, DTensor)
                    saved = file.get_tensor if is_whole else file.get_slice
                    local(mine).copy_(saved(short) if is_whole else part_of(saved(short), mine))


def part_of(whole: Any, mine: DTensor) -> Tensor:
    """Of a tensor, which may be in a file, what a DTensor has of it here: one block."""
    shape, offset = compute_local_shape_and_global_offset(
        mine.shape, mine.device_mesh, mine.placements
    )
    part = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return whole[part] if part and math.prod(shape) else torch.empty(shape)


# ---- gathered -----------------------------------------------------------------------------------


@torch.no_grad()
def gathered(lm: nn.Module) -> dict[str, Tensor] | None:
    """All weights in rank 0's host memory, a tensor at a time; None on the others.

    Tied weights are one tensor. All ranks take part.
    """
    seen: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, value in lm.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen[id(value)] = whole_on_first(value.detach())
        found[name] = seen[id(value)]
    return found if dist.get_rank() == 0 else None


def whole_on_first(value: Tensor) -> Tensor:
    """On rank 0, in host memory; the others have an empty one."""
    full = whole_of(value)
    is_first = dist.get_rank() == 0
    return full.to("cpu", copy=True) if is_first else torch.empty(0)


def whole_of(value: Tensor) -> Tensor:
    """On all ranks, which must all ask. One dimension of the mesh after the other: of both at once
    torch warns that it does so."""
    if not isinstance(value, DTensor):
        return value
    for dim in range(value.device_mesh.ndim - 1):
        done = [Replicate()] * (dim + 1)
        value = value.redistribute(placements=[*done, *value.placements[dim + 1 :]])
    return value.full_tensor()


def assembled(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """`model` as it would be in one process, of these weights."""
    with without_weights():
        whole: Any = type(model)(copy.deepcopy(model.config))
    whole.generation_config = copy.deepcopy(model.generation_config)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    return whole
