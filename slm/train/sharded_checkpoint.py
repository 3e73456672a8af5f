"""Checkpoints that all ranks write and any number of them reads: torch.distributed.checkpoint.

    step-00000400.ckpt/            a folder in the place of a file
        __0_0.distcp, __1_0...     the shards of a rank
        index.json                 which part of which tensor is where
        rest.pt                    all that is no shard, as in a file of one process
    step-00000400.ckpt.json        the hashes of these, written last; without it: unfinished

PyTorch's own index is a pickle of its classes, which reading would unpickle: ours is JSON. What one
process reads is what its own checkpoint would hold.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from slm.errors import UserError
from slm.store.files import (
    Json,
    atomic_file,
    cannot_write,
    read_json,
    synced_sha256,
    write_json,
)

INDEX_FILE, REST, TIES = "index.json", "rest.pt", "ties"
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float64)}
SHARDED = ("state_dict", "optimizer_states")  # of a checkpoint of Lightning

Place = tuple[Any, ...]  # the keys that lead to a value of a checkpoint


# ---- what is sharded -----------------------------------------------------------------------------


def taken_apart(tree: Any, shards: dict[Place, DTensor], place: Place = ()) -> Any:
    """`tree` with None for every DTensor, which go into `shards` by their places."""
    if isinstance(tree, DTensor):
        shards[place] = tree
        return None
    if isinstance(tree, Mapping):
        return {k: taken_apart(v, shards, (*place, k)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [taken_apart(v, shards, (*place, k)) for k, v in enumerate(tree)]
    return tree


def put_together(rest: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """In place. values: by the keys of their places"""
    for key, value in values.items():
        *above, last = place_of(key)
        branch: Any = rest
        for name in above:
            branch = branch[name]
        branch[last] = value
    state = rest["state_dict"]
    return rest | {"state_dict": state | {tie: state[name] for tie, name in rest.pop(TIES).items()}}


def key_of(place: Place) -> str:
    return json.dumps(place)


def place_of(key: str) -> Place:
    return tuple(json.loads(key))


# ---- the index -----------------------------------------------------------------------------------


class Writer(FileSystemWriter):
    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0, when all have written."""
        where = {result.index: result.storage_data for part in results for result in part}
        index = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), key
            pieces = [
                {"offset": list(chunk.offsets), "size": list(chunk.sizes)}
                | {"file": info.relative_path, "start": info.offset, "length": info.length}
                for chunk in tensor.chunks
                for info in (where[MetadataIndex(key, chunk.offsets)],)
            ]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[key] = {"dtype": dtype, "size": list(tensor.size), "pieces": pieces}
        write_json(Path(self.path) / INDEX_FILE, index)


class Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        where = {}
        for key, tensor in read_index(Path(self.path)).items():
            chunks = []
            for piece in tensor["pieces"]:
                offset = torch.Size(piece["offset"])
                chunks.append(ChunkStorageMetadata(offset, torch.Size(piece["size"])))
                where[MetadataIndex(key, offset)] = _StorageInfo(
                    piece["file"], piece["start"], piece["length"]
                )
            properties = TensorProperties(dtype=DTYPES[tensor["dtype"]])
            tensors[key] = TensorStorageMetadata(properties, torch.Size(tensor["size"]), chunks)
        return Metadata(tensors, storage_data=where)


def read_index(folder: Path) -> Json:
    return read_json(folder / INDEX_FILE)


# ---- written -------------------------------------------------------------------------------------


def snapshot(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in host memory, while the training goes on."""
    return tree_map(
        lambda v: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v, dict(checkpoint)
    )


def write_shards(
    folder: Path, checkpoint: Mapping[str, Any], ties: Mapping[str, str], group: Any = None
) -> None:
    """By all ranks, into a folder that is there; `own_hashes` brings it to the disk.

    ties:  names in the state_dict of weights that have another name, too; they are written once
    group: of the ranks, where others than torch's own are to exchange what is where
    """
    shards: dict[Place, DTensor] = {}
    state = {k: v for k, v in checkpoint["state_dict"].items() if k not in ties}
    checkpoint = {**checkpoint, "state_dict": state, TIES: dict(ties)}
    sharded = {name: taken_apart(checkpoint[name], shards, (name,)) for name in SHARDED}
    values: dict[str, Any] = {key_of(place): shard for place, shard in shards.items()}
    try:
        save(values, storage_writer=Writer(folder, sync_files=False), process_group=group)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, OSError):
            raise cannot_write(folder, first) from error
        raise
    if dist.get_rank() == 0:
        with atomic_file(folder / REST) as file:
            torch.save({**checkpoint, **sharded}, file)


def own_hashes(folder: Path) -> dict[str, str]:
    """Of what this rank has written, made sure to be on the disk meanwhile; rank 0 the index and
    the rest, too."""
    rank, hashes = dist.get_rank(), {}
    more = [folder / INDEX_FILE, folder / REST] if rank == 0 else []
    for path in (*sorted(folder.glob(f"__{rank}_*.distcp")), *more):
        with open(path, "rb") as file:
            hashes[path.name] = synced_sha256(file)
    return hashes


# ---- read ----------------------------------------------------------------------------------------


def read_rest(folder: Path) -> dict[str, Any]:
    return torch.load(folder / REST, map_location="cpu", weights_only=True)


def read_whole(folder: Path) -> dict[str, Any]:
    """The checkpoint that one process would have written."""
    whole: dict[str, Any] = {
        key: torch.empty(tensor["size"], dtype=DTYPES[tensor["dtype"]])
        for key, tensor in read_index(folder).items()
    }
    fill(whole, folder, alone=True)
    return put_together(read_rest(folder), whole)


def read_shards(folder: Path, own: Callable[[Place], Tensor | None]) -> dict[str, Any]:
    """The same in shards like those of the parameters here, each rank its own part.

    own: the parameter that the value at a place belongs to
    """
    values: dict[str, Any] = {}
    for key, tensor in read_index(folder).items():
        parameter, size = own(place_of(key)), tuple(tensor["size"])
        if parameter is None or tuple(parameter.shape) != size:
            shape = None if parameter is None else tuple(parameter.shape)
            raise UserError(
                f"{folder} is of another model: {name_of(place_of(key))} has the shape {size}, "
                f"in this run {'it does not exist' if shape is None else shape}"
            )
        values[key] = torch.empty_like(parameter, dtype=DTYPES[tensor["dtype"]])
    fill(values, folder, alone=False)
    return put_together(read_rest(folder), values)


def fill(values: dict[str, Any], folder: Path, alone: bool) -> None:
    """alone: without the other ranks"""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
            load(values, storage_reader=Reader(folder), no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder} cannot be read: {first}") from error


def name_of(place: Place) -> str:
    return ".".join(map(str, place))
