"""What was read of each part of a data mixture, an arm: Phi-4's table 5 (arXiv 2412.08905)."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from slm.report.arms import Arm, Run
from slm.store.files import Json
from slm.train.mixture import TABLE


def mixture_rows(arms: Sequence[Arm]) -> list[Json]:
    """A row an arm and part, the means over the arm's seeds; none of arms without a mixture."""
    return [row for arm in arms for row in arm_rows(arm)]


def arm_rows(arm: Arm) -> list[Json]:
    tables = [pd.read_csv(path) for path in map(table_of, arm.runs) if path.exists()]
    if not tables:
        return []
    means = pd.concat(tables).groupby("part", sort=False).mean()  # of what was logged
    rows = means.reset_index().to_dict("records")
    return [{"arm": arm.label, **{str(key): value for key, value in row.items()}} for row in rows]


def table_of(run: Run) -> Path:
    return run.folder / TABLE
