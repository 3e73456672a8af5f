"""Parquet files, by row groups: where they may be cut, and the rows of some of them.

Memory is that of the pages of ROWS_AT_ONCE rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slm.errors import UserError
from slm.prepare.places import open_bytes
from slm.prepare.scan import Cut

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS_AT_ONCE = 256


@contextmanager
def opened(file: str) -> Iterator["ParquetFile"]:
    from pyarrow.parquet import ParquetFile  # here, not above: 0.3 s, and only these files need it

    try:
        with open_bytes(file) as stream:
            yield ParquetFile(stream)
    except UserError:
        raise
    # Whatever Arrow or the client of a store raise, the user needs the name and the reason.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read as parquet: {reason}") from None


def places(table: "ParquetFile") -> list[Cut]:
    """Where each row group begins, in bytes of rows as they are stored, and the end."""
    found, metadata = [Cut(0, 0)], table.metadata
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(i).total_compressed_size for i in range(group.num_columns))
        position, rows = found[-1]
        found.append(Cut(position + sum(columns), rows + group.num_rows))
    return found


def row_groups(file: str) -> list[Cut]:
    """Places between row groups."""
    with opened(file) as table:
        return places(table)[1:-1]


def read_rows(
    file: str, columns: list[str], first: int = 0, last: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the groups that begin at the bytes [first, last) of `places`; None: to the end.

    columns: what is read, where all of them are there
    """
    with opened(file) as table:
        starts = enumerate(place.position for place in places(table)[:-1])
        groups = [i for i, start in starts if first <= start and (last is None or start < last)]
        names = columns if set(columns) <= set(table.schema_arrow.names) else None
        for batch in table.iter_batches(ROWS_AT_ONCE, groups, names):
            yield from batch.to_pylist()
