"""FSDP2 through Lightning: `trainer=fsdp`.

Lightning's ModelParallelStrategy makes the processes and the mesh. Its defaults are not taken: it
would make tensor parallelism of the ranks of a machine, which then all train on other windows. What
a checkpoint holds is what DDP's does, but in shards, so that runs may go from one to the other.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from slm.errors import UserError, said_once
from slm.model.build import SelectiveLM
from slm.model.parallel import KEY, TENSOR_PARALLEL, tied_names
from slm.model.sharded import Cut, refused_together, shard, together
from slm.selection.rule import RANKED
from slm.store.claims import Owner, process_name, remove_temporaries
from slm.store.files import hash_json, naming, sync_folder
from slm.train.checkpoint import VerifiedCheckpointIO, read_checkpoint, remove_checkpoint, vouch
from slm.train.sharded_checkpoint import own_hashes, read_shards, snapshot, write_shards


class Sharded(ModelParallelStrategy):
    """Parameters, gradients and optimizer states in shards over all ranks.

    tensor_parallel_size:   ranks that follow one another share every layer out and have the same
                            windows; the others are data-parallel
    cpu_offload:            shards and the optimizer in host memory
    reshard_after_forward:  a layer's weights are gathered once more for its backward pass; else
                            they stay in between, which is faster and takes more memory
    async_checkpoints:      copied to host memory, then written beside the training
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        async_checkpoints: bool = False,
        tensor_parallel_size: int = 1,
    ):
        on_both = cpu_offload and torch.cuda.is_available()  # shards in host memory are summed too
        super().__init__(process_group_backend="cpu:gloo,cuda:nccl" if on_both else None)
        self.cpu_offload, self.reshard_after_forward = cpu_offload, reshard_after_forward
        self.async_checkpoints, self.tensor_parallel_size = async_checkpoints, tensor_parallel_size
        self.saving: Saving | None = None
        self.group: Any = None
        self.background = ThreadPoolExecutor(1)

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
        sizes: Any = self.data_ranks.count, self.tensor_parallel_size
        self._data_parallel_size, self._tensor_parallel_size = sizes
        super().setup_environment()
        RANKED.set(self.data_ranks.group)

    def teardown(self) -> None:
        RANKED.set(None)
        super().teardown()

    @property
    def data_ranks(self) -> "DataRanks":
        size = self.tensor_parallel_size
        if self.world_size % size:
            raise UserError(f"{KEY} ({size}) must divide the number of ranks ({self.world_size})")
        mesh = self._device_mesh
        group = None if mesh is None else mesh["data_parallel"].get_group()
        return DataRanks(self.global_rank // size, self.world_size // size, group)

    def shard(self, lm: SelectiveLM, precision: str) -> None:
        mesh = self.device_mesh["data_parallel"]
        within = self.device_mesh[TENSOR_PARALLEL] if self.tensor_parallel_size > 1 else None
        dtype = torch.bfloat16 if precision == "bf16-mixed" else None
        cut = Cut(mesh, dtype, self.cpu_offload, self.reshard_after_forward, within)
        with refused_together():
            shard(lm, lm.model, cut)
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
        io, module, path = self.checkpoint_io, self.lightning_module, Path(filepath)
        assert module is not None and isinstance(io, VerifiedCheckpointIO)
        self.settle(wait=True)
        beside, names = self.async_checkpoints, tied_names(module)
        group, content = None, checkpoint
        if beside:
            group, content = self._own_group(), snapshot(checkpoint)
        new = begin_saving(path, io.owner)

        def write() -> dict[str, str]:
            write_shards(new, content, names, group)
            return own_hashes(new)

        run = self.background.submit if beside else at_once
        self.saving = Saving(path, new, content, io.owner, run(write))
        self.settle(wait=not beside)

    def settle(self, wait: bool) -> None:
        """Make a checkpoint of what was written in the background; by all ranks."""
        if self.saving is None:
            return
        written = wait or self.reduce_boolean_decision(self.saving.hashes.done())
        if written:
            saving, self.saving = self.saving, None
            end_saving(saving)

    def _own_group(self) -> Any:
        """Beside the training, whose exchanges come in another order."""
        self.group = self.group or dist.new_group(backend="gloo")
        return self.group

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """A file of one process, whole and not yet in memory; a folder, in shards. Rank 0 has
        verified it."""
        path = Path(checkpoint_path)
        with said_once(self.global_rank):
            if path.is_dir():
                return read_shards(path, self._own)
            return read_checkpoint(path, mmap=True)

    def _own(self, place: tuple[Any, ...]) -> Tensor | None:
        """The parameter that the value at a place of a checkpoint belongs to."""
        if place[0] == "state_dict":
            state = self.lightning_module_state_dict()
            return state[place[1]] if place[1] in state else None
        _, number, _, parameter, _ = place
        own = dict(numbered(self.optimizers[number])) if number < len(self.optimizers) else {}
        return own[parameter] if parameter in own else None

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        mine, state = self.lightning_module.state_dict(), checkpoint["state_dict"]
        state = {name: like(mine[name], value) for name, value in state.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = {
                number: {name: like(own, value) for name, value in saved["state"][number].items()}
                for number, own in numbered(optimizer)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})


class DataRanks(NamedTuple):
    """Whose windows are whose: ranks that share every layer out count as one."""

    rank: int
    count: int
    group: Any  # those with other windows than this one's; None: all ranks


def data_ranks(trainer: Trainer) -> DataRanks:
    strategy = trainer.strategy
    if isinstance(strategy, Sharded):
        return strategy.data_ranks
    return DataRanks(trainer.global_rank, trainer.world_size, None)


class Saving(NamedTuple):
    """A checkpoint that is being written."""

    path: Path
    new: Path  # the folder that is to become it
    about: Mapping[str, Any]  # what its record says
    owner: Owner  # of the run's folder, on rank 0
    hashes: Future[dict[str, str]]  # of this rank's files, when they are written


def begin_saving(path: Path, owner: Owner) -> Path:
    """By all ranks: the folder that is to become `path`."""
    new = together(path.with_name(f".{path.name}.{process_name()}.tmp"))[0]
    with refused_together(), naming(path):
        if dist.get_rank() == 0:
            owner.check()
            remove_temporaries(path.parent, path.name)
            new.mkdir(parents=True)
    return new


def at_once(write: Callable[[], dict[str, str]]) -> Future[dict[str, str]]:
    """In this thread, whose device is this rank's."""
    done: Future[dict[str, str]] = Future()
    try:
        done.set_result(write())
    except BaseException as error:
        done.set_exception(error)
    return done


def end_saving(saving: Saving) -> None:
    """By all ranks, when all have written: rank 0 renames the folder, its record comes last."""
    path, new, about, owner, hashes = saving
    is_first = dist.get_rank() == 0
    with refused_together(), naming(path, new if is_first else None):
        mine = hashes.result()
    files = {name: digest for part in together(mine) for name, digest in part.items()}
    with refused_together(), naming(path):
        if is_first:
            sync_folder(new)
            owner.check()  # a folder has no name by a link: this is as near as one comes
            remove_checkpoint(path)
            os.replace(new, path)
            sync_folder(path.parent)
            vouch(path, about, {"sha256": hash_json(files), "files": files}, owner.publish)


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
