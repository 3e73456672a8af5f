"""Megatron-LM's `.idx` and `.bin`: sequences with their offsets, documents of sequences."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm.errors import UserError
from slm.prepare.imports.parts import Options, Part, check_ends, find_files, map_numbers

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34  # magic, uint64 version, uint8 code, uint64 sequences, uint64 document indices
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


def read_megatron(given: str, options: Options) -> Iterator[Part]:
    """given: a prefix, one of the two files, a folder or a glob."""
    name = given.removesuffix(".bin")
    if Path(f"{name}.idx").expanduser().is_file():
        given = f"{name}.idx"
    for index in find_files(given, ".idx"):
        yield read_pair(index.with_suffix(".idx"))


def read_pair(index: Path) -> Part:
    dtype, lengths, offsets, documents = read_index(index)
    binary = index.with_suffix(".bin")
    tokens = map_numbers(binary, dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    expected = (ends - lengths) * np.dtype(dtype).itemsize
    if len(wrong := np.flatnonzero(offsets != expected)):
        at = wrong[0]
        raise UserError(
            f"{index}: sequence {at} begins at byte {offsets[at]} of {binary.name}, {expected[at]} "
            "is expected: its sequences are not one after the other"
        )
    starts = np.concatenate([[0], ends])
    return Part(str(binary), tokens, check_ends(index, starts[documents[1:]], len(tokens)))


def read_index(index: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """dtype; tokens (s,) and offset (s,) of each sequence; document indices (d + 1,)."""
    head = map_numbers(index, "uint8", 0, HEADER).tobytes()
    if not head.startswith(MAGIC):
        raise UserError(f"{index} begins with {head[:9]!r}, an index of Megatron's with {MAGIC!r}")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{index}: version is {version} and the code of its dtype {code}, 1 and one of "
            f"{sorted(DTYPES)} (whole numbers) are read"
        )
    num_sequences, num_documents = (int(n) for n in np.frombuffer(head[18:], "<u8"))
    lengths = map_numbers(index, "int32", HEADER, num_sequences)
    offsets = map_numbers(index, "int64", HEADER + 4 * num_sequences, num_sequences)
    documents = map_numbers(index, "int64", HEADER + 12 * num_sequences, num_documents)
    found = (int(documents[0]), int(documents[-1])) if num_documents else ()
    if found != (0, num_sequences) or (np.diff(documents) < 0).any():
        raise UserError(
            f"{index}: its documents span the sequences {found}, it has {num_sequences}"
        )
    return DTYPES[code], lengths, offsets, documents
