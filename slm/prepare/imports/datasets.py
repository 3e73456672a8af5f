"""`input_ids` of a folder that `datasets` saved, or of Parquet files.

A row is a document, or several by `seq_lengths` or `position_ids`; `labels` of -100 are no targets,
`token_weight` is what losses are multiplied by.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from slm.errors import UserError
from slm.prepare.imports.parts import Options, Part, find_files
from slm.prepare.imports.rows import beside, check_labels, read_rows
from slm.store.shards import WEIGHT

ROWS_AT_ONCE = 1024


def read_datasets(given: str, options: Options) -> Iterator[Part]:
    for place, number, table in read_tables(given):
        if "input_ids" not in table.column_names:
            raise UserError(f"{place} has no input_ids, it has {', '.join(table.column_names)}")
        try:
            rows = read_rows(table, number, options.vocab_size)
            masks = weights = None
            if "labels" in table.column_names:
                masks = check_labels(rows, beside(table, "labels", rows))
            if WEIGHT in table.column_names:
                weights = beside(table, WEIGHT, rows)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        ends = np.append(np.flatnonzero(rows.first), len(rows.ids))[1:]
        yield Part(f"{place}, row {number}", rows.ids, ends, masks, weights)


def read_tables(given: str) -> Iterator[tuple[str, int, pa.Table]]:
    """Where it is, the number of its first row, some rows."""
    if (Path(given).expanduser() / "dataset_dict.json").is_file():
        raise UserError(f"{given} holds several splits: give the folder of one, as {given}/train")
    if (Path(given).expanduser() / "state.json").is_file():
        from datasets import load_from_disk

        rows = load_from_disk(str(Path(given).expanduser())).with_format("arrow")
        for first in range(0, len(rows), ROWS_AT_ONCE):
            yield given, first, rows[first : first + ROWS_AT_ONCE]
        return
    from pyarrow.parquet import ParquetFile

    for path in find_files(given, ".parquet"):
        number = 0
        try:
            for batch in ParquetFile(path).iter_batches(ROWS_AT_ONCE):
                yield str(path), number, pa.Table.from_batches([batch])
                number += len(batch)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} is no whole Parquet file: {error}") from None
