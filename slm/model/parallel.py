"""Tensor parallelism: every layer shared out over ranks that compute the same windows.

How a model is cut is said by its class in transformers (`base_model_tp_plan`): attention by heads,
the MLP by its inner width, embedding and head by the vocabulary. Nothing is gathered but hidden
states, which every rank has whole; logits are made of a rank's own part of the vocabulary alone
(`slm_kernels.vocabulary`).
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from slm.errors import UserError
from slm.model.architecture import text_config

TENSOR_PARALLEL = "tensor_parallel"  # a mesh's dimension, as Lightning names it
MESHES = ((TENSOR_PARALLEL,), ("tp",))  # and as transformers does
KEY = "trainer.strategy.tensor_parallel_size"
HEADS = ("num_attention_heads", "num_key_value_heads")
# The ways to cut of transformers that are known here. Others are of experts and fused layers, which
# torch.distributed.checkpoint cannot save (findings/fused_weights_are_not_saved.sh).
STYLES = ("colwise", "rowwise", "colwise_gather_output", "rowwise_split_input")
STYLES += ("embedding_rowwise", "replicated_with_grad_allreduce")


def share_out(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut the weights of `model`, in place, over a mesh of one dimension; tied ones stay tied."""
    check_heads(model, mesh.size())
    ties = tied_names(model)
    apply_tensor_parallelism(model, mesh, plan_of(model))
    for name, first in ties.items():
        above, _, last = name.rpartition(".")
        model.get_submodule(above)._parameters[last] = model.get_parameter(first)
    for name, parameter in model.named_parameters():
        check_parts(name, parameter, mesh.size())


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """How each parameter is cut, and what its module does around its forward; by their names."""
    kind, rules = type(model).__name__, model.tp_plan
    if not text_config(model.config).base_model_tp_plan:
        raise UserError(f"{KEY}: {kind} has no plan in transformers of how its layers are cut")
    plan = {}
    for name, owner in names_in(model):
        rule = next((rules[key] for key in (wild(name), wild(owner)) if key in rules), None)
        if rule is not None:
            plan[name] = rule
    for name, style in plan.items():
        if style not in STYLES:
            raise UserError(
                f"{KEY}: the plan of {kind} cuts {name} as {style!r}, which cannot be trained "
                f"here (known: {', '.join(STYLES)})"
            )
    return plan


def names_in(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Of parameters with their modules', then of modules, with an empty one."""
    for name, _ in model.named_parameters():
        yield name, name.rpartition(".")[0]
    yield from ((name, "") for name, _ in model.named_modules())


def wild(name: str) -> str:
    return replace_layer_number_by_wildcard(name)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of parameters, and their first."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    pairs = {name: first.setdefault(id(parameter), name) for name, parameter in named}
    return {name: other for name, other in pairs.items() if name != other}


def check_heads(model: PreTrainedModel, size: int) -> None:
    fields = text_config(model.config).to_dict()
    for name in HEADS:
        if name in fields and fields[name] is not None and fields[name] % size:
            raise UserError(
                f"{KEY} is {size}, and the model's {name} is {fields[name]}: heads are shared out "
                "whole, so the one must divide the other"
            )


def check_parts(name: str, parameter: Tensor, size: int) -> None:
    """As torch.chunk cuts, some ranks may get nothing."""
    if not isinstance(parameter, DTensor):
        return
    for placement in parameter.placements:
        if isinstance(placement, Shard):
            length = parameter.shape[placement.dim]
            if -(-length // size) * (size - 1) >= length:
                raise UserError(
                    f"{KEY} is {size}, and {name} is cut along a length of {length} "
                    f"{tuple(parameter.shape)}: some ranks would have none of it"
                )


def vocab_group_of(weight: Tensor) -> Any:
    """The ranks over which the rows of a head are cut, outside of FSDP; else None."""
    is_cut = isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names in MESHES
    return weight.device_mesh.get_group() if is_cut else None  # type: ignore[attr-defined]
