"""FSDP2 through Lightning: `trainer=fsdp`.

Lightning's ModelParallelStrategy makes the processes and the mesh. Its defaults are not taken: it
would make tensor parallelism of the ranks of a machine, which then all train on other windows. What
a checkpoint holds is what DDP's does, but in shards, so that runs may go from one to the other.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from slm.model.build import SelectiveLM
from slm.model.sharded import Cut, shard, whole_on_first


class Sharded(ModelParallelStrategy):
    """Parameters, gradients and optimizer states in shards over all ranks.

    cpu_offload:            shards and the optimizer in host memory
    reshard_after_forward:  a layer's weights are gathered once more for its backward pass; else
                            they stay in between, which is faster and takes more memory
    """

    def __init__(self, cpu_offload: bool = False, reshard_after_forward: bool = True):
        # Both backends: tensors in host memory are exchanged too.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
        super().__init__(process_group_backend=backend)
        self.cpu_offload, self.reshard_after_forward = cpu_offload, reshard_after_forward

    def _configure_launcher(self) -> None:
        """As DDP's: also a process that another launcher started is told here when to begin."""
        assert self.cluster_environment is not None
        self._launcher = _SubprocessScriptLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes
        )

    def setup_environment(self) -> None:
        if self.lightning_module is None:  # fit.py starts the ranks before there is a module
            self._setup_distributed()
            return
        sizes: Any = self.world_size, 1
        self._data_parallel_size, self._tensor_parallel_size = sizes
        super().setup_environment()

    def shard(self, lm: SelectiveLM, precision: str) -> None:
        mesh = self.device_mesh["data_parallel"]
        dtype = torch.bfloat16 if precision == "bf16-mixed" else None
        shard(lm, lm.model, Cut(mesh, dtype, self.cpu_offload, self.reshard_after_forward))
        lm.computes_on = self.root_device

    def model_to_device(self) -> None:
        """Shards and buffers are where they belong."""
        assert self.lightning_module is not None
        self.lightning_module._device = self.root_device

    # ---- checkpoints: as those of DDP, with DTensors for tensors ---------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        whole = tree_map(lambda v: whole_on_first(v) if isinstance(v, DTensor) else v, checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        mine = self.lightning_module.state_dict()
        state = {name: like(mine[name], value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = {
                number: {name: like(own, value) for name, value in saved["state"][number].items()}
                for number, own in numbered(optimizer)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})


def numbered(optimizer: Optimizer) -> Iterator[tuple[int, Tensor]]:
    """Its parameters under the numbers of its state_dict."""
    groups = optimizer.param_groups
    return enumerate(parameter for group in groups for parameter in group["params"])


def like(own: Tensor, value: Any) -> Any:
    """A whole tensor of the parameter's shape in the parameter's shards; all else as it is."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not (isinstance(own, DTensor) and is_whole and value.shape == own.shape):
        return value
    device = own.to_local().device
    cut = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    return cut if cut.to_local().device == device else cut.to(device)
