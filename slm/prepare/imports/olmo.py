"""OLMo-core's and Dolma's token files: raw numbers in spite of `.npy`, their documents beside them.

`part-0.csv.gz` beside `part-0.npy` has a line a document: start, end, ...; without it EOS tells.
"""

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm.errors import UserError
from slm.prepare.imports.flat import NUMPY
from slm.prepare.imports.parts import (
    Options,
    Part,
    check_ends,
    find_files,
    map_numbers,
    same_length,
)


def read_olmo(given: str, options: Options) -> Iterator[Part]:
    """masks: label masks, a file for each of the tokens' in the order of their names."""
    files = find_files(given, ".npy")
    masks = None if options.masks is None else find_files(options.masks, ".npy")
    if masks is not None:
        files = [file for file in files if file not in masks]
        if len(masks) != len(files):
            raise UserError(f"masks={options.masks} are {len(masks)} files, path {len(files)}")
    for number, path in enumerate(files):
        tokens = map_numbers(path, options.token_dtype)
        if tokens[:8].tobytes().startswith(NUMPY):
            raise UserError(f"{path} begins with NumPy's header: format=npy reads it")
        live = None
        if masks is not None:
            live = same_length(masks[number], map_numbers(masks[number], "bool"), tokens)
        index = path.with_suffix(".csv.gz")
        ends = read_documents(index, len(tokens)) if index.exists() else None
        yield Part(str(path), tokens, ends, live)


def read_documents(index: Path, total: int) -> np.ndarray:  # (d,) int64
    """Ends of the documents, which follow one another."""
    try:
        with gzip.open(index, "rt", encoding="utf-8", newline="") as file:
            spans = np.array([row[:2] for row in csv.reader(file)], np.int64).reshape(-1, 2)
    except (ValueError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{index} is damaged, or no table of start,end: {error}") from None
    expected = np.concatenate([[0], spans[:-1, 1]])
    if len(wrong := np.flatnonzero(spans[:, 0] != expected[: len(spans)])):
        at = wrong[0]
        raise UserError(
            f"{index}: document {at} begins at token {spans[at, 0]}, {expected[at]} is expected"
        )
    ends = spans[:, 1]
    if len(ends) == 0 or ends[-1] < total:  # OLMo-core lists none that ends without EOS
        ends = np.append(ends, total)
    return check_ends(index, ends, total)
