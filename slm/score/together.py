"""A model that the processes of one torchrun hold together, since no device could by itself.

The first of them reads the corpus and fills the store; it hands each batch to the others. Layers
are cut by transformers' tensor-parallel plan of the model, and all compute all of the batch; or, of
any model, weights are in shards (FSDP2), gathered a layer at a time, and each computes its windows.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from slm.errors import UserError
from slm.model.build import SelectiveLM, load_model
from slm.model.sharded import (
    Cut,
    fill_from,
    refused_together,
    shard,
    together,
    weights_in,
    without_weights,
)
from slm.score.reference import ModelScores
from slm.store.files import Json
from slm.store.windows import Batch


class TensorParallelScores(ModelScores):
    """The first process fills the store, the others compute what it computes."""

    def forward(self, batch: Batch) -> Mapping[str, Tensor]:
        distributed.broadcast_object_list([batch], 0)
        return self.compute_together(batch)

    def compute_together(self, batch: Batch) -> Mapping[str, Tensor]:
        return super().forward(batch)

    @contextmanager
    def leading(self) -> Iterator[bool]:
        leads, is_done = distributed.get_rank() == 0, False
        try:
            if not leads:
                self.follow()
            yield leads
            is_done = True
        finally:
            if leads:
                distributed.broadcast_object_list([is_done], 0)
            distributed.destroy_process_group()

    def follow(self) -> None:
        """Until the first process has the whole store, or has failed and said why."""
        asked: list[Any] = [None]
        while True:
            distributed.broadcast_object_list(asked, 0)
            if isinstance(asked[0], bool):
                if not asked[0]:
                    raise SystemExit(1)
                return
            self.compute_together(asked[0])


class ShardedScores(TensorParallelScores):
    """Each process computes its windows of the batch, and has a part of the weights."""

    def compute_together(self, batch: Batch) -> Mapping[str, Tensor]:
        rank, count = distributed.get_rank(), distributed.get_world_size()
        size = len(batch["input_ids"])
        mine = [*range(rank, size, count)]
        # One that has none computes the first: layers are gathered by all.
        part = {name: values[mine or [0]] for name, values in batch.items()}
        found = {name: values.cpu() for name, values in super().compute_together(part).items()}
        whole = {name: values.new_empty(size, *values.shape[1:]) for name, values in found.items()}
        for other, parts in enumerate(together(found)):
            for name, values in parts.items():
                rows = [*range(other, size, count)]
                whole[name][rows] = values[: len(rows)]
        return whole


def join(key: str, count: int, device: torch.device) -> None:
    """The group of this torchrun's processes."""
    started = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else 1
    if started != count:
        raise UserError(
            f"{key} is {count}, and torchrun started {started} processes here: one call of "
            f"`torchrun --nproc-per-node={count} -m slm.score ...` holds one copy of the model, "
            "and several calls share one folder"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def join_others(tp_size: int, device: torch.device) -> Json:
    """What from_pretrained needs to cut the model by this torchrun's processes."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        raise UserError(f"tp_size is {tp_size}, which needs a newer transformers") from None
    join("tp_size", tp_size, device)
    return {"distributed_config": DistributedConfig(tp_size=tp_size)}


def load_in_shards(
    folder: str, fsdp_size: int, device: torch.device, dtype: torch.dtype
) -> SelectiveLM:
    """Each process reads its own rows of every tensor. Buffers stay what they are in float32."""
    join("fsdp_size", fsdp_size, device)
    with refused_together():
        with without_weights():
            lm = SelectiveLM(load_model(folder)).eval()
        for parameter in lm.parameters():
            parameter.data = parameter.data.to(dtype)
        shard(lm, lm.model, Cut(init_device_mesh(device.type, (fsdp_size,))))
        files = weights_in(Path(folder), lm) if Path(folder).is_dir() else None
        if files is None:
            raise UserError(
                f"fsdp_size is {fsdp_size}, and {folder} has no safetensors with the weights of "
                f"{type(lm.model).__name__} by their own names, of which each process would read "
                "its part"
            )
        fill_from(files, lm)
    lm.computes_on = device
    return lm
