"""MosaicML's MDS: samples of named columns in shards; one column holds a sample's tokens."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from slm.errors import UserError
from slm.prepare.imports.parts import Options, Part, map_numbers, read_listing, same_length
from slm.store.fields import FILE, INDEX, OBJECT, TEXT, check_fields, list_of, one_of, optional
from slm.store.files import Json

SAMPLES_AT_ONCE = 512
NAMES = ("tokens", "input_ids")  # of the column, where none is given
DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32"}
DTYPES |= {64: "uint64", 65: "int64"}  # of an ndarray that says it itself
CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}  # theirs -> Arrow's
LISTS = {"column_names": TEXT, "column_encodings": TEXT, "column_sizes": optional(INDEX)}
SHARD = {"format": one_of("mds"), "samples": INDEX, "raw_data": OBJECT}
SHARD |= {"zip_data": optional(OBJECT)} | {name: list_of(kind) for name, kind in LISTS.items()}


def read_mds(given: str, options: Options) -> Iterator[Part]:
    """masks: the column that says which tokens are targets."""
    folder, names = Path(given).expanduser(), (options.column,) if options.column else NAMES
    for shard in read_listing(folder / "index.json", "shards", SHARD):
        path, data = shard_bytes(folder, shard)
        samples = split(path, data, shard["samples"])
        while some := list(islice(samples, SAMPLES_AT_ONCE)):
            found, live = [numbers(path, shard, names, options.dtype, s) for s in some], None
            tokens, ends = np.concatenate(found), np.cumsum([len(ids) for ids in found])
            if options.masks is not None:
                live = [numbers(path, shard, (options.masks,), "bool", s) for s in some]
                live = same_length(path, np.concatenate(live).astype(bool), tokens)
            yield Part(str(path), tokens, ends, live)


def shard_bytes(folder: Path, shard: Json) -> tuple[Path, np.ndarray]:  # (b,) uint8
    """The shard itself; where only its compressed form is there, that in memory."""
    packed, codec = shard["zip_data"], {"compression": str(shard["compression"]).partition(":")[0]}
    check_fields(folder / "index.json", shard["raw_data"], {"basename": FILE})
    path = folder / shard["raw_data"]["basename"]
    if packed is None or path.exists():
        return path, map_numbers(path, "uint8")
    known = {"basename": FILE, "compression": one_of(*CODECS)}
    check_fields(folder / "index.json", packed | codec, known)
    path = folder / packed["basename"]
    try:
        with pa.input_stream(str(path), compression=CODECS[codec["compression"]]) as file:
            return path, np.frombuffer(file.read(), np.uint8)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def split(path: Path, data: np.ndarray, count: int) -> Iterator[np.ndarray]:  # (b,) uint8 each
    head = np.resize(data[: 4 * (count + 2)], 4 * (count + 2)).view("<u4").tolist()
    if head[0] != count or head[-1] != len(data):
        said = f"{count} samples by index.json; its header says {head[-1]} and {head[0]}"
        raise UserError(f"{path} has {len(data)} bytes and {said}")
    yield from (data[begin:end] for begin, end in zip(head[1:-1], head[2:], strict=True))


def numbers(
    path: Path, shard: Json, names: Sequence[str], dtype: str | None, sample: np.ndarray
) -> np.ndarray:
    """One sample's entries of the first column of `names` that is there; dtype: that of `bytes`."""
    known, fixed = shard["column_names"], shard["column_sizes"]
    at = next((known.index(name) for name in names if name in known), None)
    if at is None:
        raise UserError(f"{path} has no column {' or '.join(names)}, it has {', '.join(known)}")
    start = 4 * fixed.count(None)  # sizes come first, of the columns that have no fixed one
    told = iter(sample[:start].view("<u4").tolist())
    ends = np.cumsum([start, *(next(told) if size is None else size for size in fixed)])
    value, kind = sample[slice(*ends[at : at + 2])], shard["column_encodings"][at]
    kind, *rest = kind.split(":")
    name = rest[0] if rest else dtype or "int64"  # llm-foundry's
    if kind == "ndarray" and not rest:
        name, value = DTYPES.get(int(value[0]), "none"), value[1:]
    if kind == "ndarray" and len(rest) < 2:  # a byte for the number of axes and their type
        value = value[1 + (int(value[0]) >> 2) * (1 << (int(value[0]) & 3)) :]
    readable = kind in ("bytes", "ndarray") and name in (*DTYPES.values(), "bool")
    if not readable or len(value) % np.dtype(name).itemsize:
        raise UserError(f"{path}: {len(value)} bytes of {kind} are no whole numbers ({name})")
    return value.view(np.dtype(name).newbyteorder("<"))
