"""The table of a report: every arm on every held-out set, with spread over seeds."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slm.dynamics.figure import decimals
from slm.report.arms import Arm, costs
from slm.store.files import Json
from slm.train.curves import Curve

REACH_NOTE = (
    "Tokens to all tokens' loss: where the held-out loss first is at or below the mean final loss "
    "of all tokens, on a line between measurements, of which the first is before training; mean "
    "over seeds; all tokens themselves: all they saw; "
    "empty: a seed never gets there, or no run is on all tokens."
)


def control_losses(arms: Sequence[Arm], sets: Sequence[str]) -> dict[str, float]:
    """Mean final loss of the runs on all tokens, for each set; empty where there are none."""
    controls = [arm for arm in arms if arm.takes_all_tokens]
    if not controls:
        return {}
    return {
        name: float(np.mean([x for arm in controls for x in arm.losses(name)])) for name in sets
    }


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """Tokens until the curve first is at or below `loss`, linear between points; None: never."""
    below = np.flatnonzero(curve.loss <= loss)
    if len(below) == 0:
        return None
    index = int(below[0])
    pair = slice(max(0, index - 1), index + 1)
    return float(np.interp(-loss, -curve.loss[pair], curve.tokens_seen[pair]))


def mean_tokens_to_reach(arm: Arm, name: str, loss: float) -> int | None:
    """Mean over seeds; None where a seed never gets there. All tokens get there at their end."""
    if arm.is_control:
        return round(arm.mean(lambda run: run.lineage["tokens_seen"]))
    found = [tokens_to_reach(run.curves[name], loss) for run in arm.runs]
    reached = [tokens for tokens in found if tokens is not None]
    return round(float(np.mean(reached))) if len(reached) == len(found) else None


def table_rows(arms: Sequence[Arm], sets: Sequence[str], control: dict[str, float]) -> list[Json]:
    rows = [table_row(arm, name, control) for arm in arms for name in sets]
    columns = dict.fromkeys((key for row in rows for key in row), None)
    return [columns | row for row in rows]


def table_row(arm: Arm, name: str, control: dict[str, float]) -> Json:
    losses = arm.losses(name)
    reached = mean_tokens_to_reach(arm, name, control[name]) if control else None
    shared = set.intersection(*(set(costs(run)) for run in arm.runs))
    return {
        "arm": arm.label,
        "rule": arm.runs[0].rule,
        "select_ratio": arm.select_ratio,
        "set": name,
        "mean": round(float(np.mean(losses)), 6),
        "low": round(min(losses), 6),
        "high": round(max(losses), 6),
        "seeds": len(losses),
        "tokens_seen": round(arm.mean(lambda run: run.lineage["tokens_seen"])),
        "tokens_selected": round(arm.mean(lambda run: run.lineage["tokens_selected"])),
        "tokens_to_all_tokens_loss": reached,
    } | {key: arm.mean(lambda run, key=key: costs(run)[key]) for key in sorted(shared)}


def markdown(rows: Sequence[Json], sets: Sequence[str], left_out: dict[Path, str]) -> str:
    """One line an arm, a column a set: mean (lowest to highest)."""
    by_arm: dict[str, dict[str, Json]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["set"]] = row
    reach = [f"tokens to all tokens' loss, {name}" for name in sets]
    head = ["arm", *sets, "seeds", "tokens seen", "tokens selected", *reach]
    lines = [line_of(head), "| --- " * len(head) + "|"]
    for label, found in by_arm.items():
        row = found[sets[0]]
        counts = [f"{row[key]:,}" for key in ("seeds", "tokens_seen", "tokens_selected")]
        ends = [found[name]["tokens_to_all_tokens_loss"] for name in sets]
        cells = [label, *(spread_text(found[name]) for name in sets), *counts]
        cells += ["" if end is None else f"{end:,}" for end in ends]
        lines.append(line_of(cells))
    lines += ["", "Final held-out loss in nats per token: mean over seeds (lowest to highest)."]
    lines += ["", REACH_NOTE, ""]
    lines += [f"Left out: `{folder}`: {reason}" for folder, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def line_of(cells: Sequence[str]) -> str:
    """A bar in a name would end its cell."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def digits(row: Json) -> int:
    """As many as the seeds agree on; 4 of a single one."""
    return decimals(row["high"] - row["low"])


def spread_text(row: Json) -> str:
    mean, low, high = (f"{row[key]:.{digits(row)}f}" for key in ("mean", "low", "high"))
    return mean if row["seeds"] == 1 else f"{mean} ({low} to {high})"
