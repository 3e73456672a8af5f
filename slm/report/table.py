"""The table of a report: every arm on every held-out set, with spread over seeds."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slm.dynamics.figure import decimals
from slm.report.arms import Arm, Run, costs
from slm.report.differences import difference, final_loss
from slm.store.files import Json
from slm.train.curves import Curve

REACH_NOTE = (
    "Tokens to all tokens' loss: where the held-out loss first is at or below the mean final loss "
    "of all tokens, on a line between measurements, and at that one where it is the first after "
    "the start of training; mean over seeds; all tokens themselves: all they saw; "
    "empty: a seed never gets there, or no run is on all tokens."
)
MINUS_NOTE = (
    "Minus all tokens: the difference of the losses, ± the 95% interval over held-out windows, "
    "paired: what other text of the same kind would change, not what other seeds would."
)


def control_runs(arms: Sequence[Arm]) -> list[Run]:
    """Those on all tokens, under whatever rule."""
    return [run for arm in arms if arm.takes_all_tokens for run in arm.runs]


def control_losses(controls: Sequence[Run], sets: Sequence[str]) -> dict[str, float]:
    """Their mean final loss, for each set; empty where there are none."""
    if not controls:
        return {}
    return {name: float(np.mean([final_loss(run, name) for run in controls])) for name in sets}


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """Tokens until the curve first is at or below `loss`, linear between points; None: never.

    Not between the first two: the fall from a model that is not trained yet is no line.
    """
    below = np.flatnonzero(curve.loss <= loss)
    if len(below) == 0:
        return None
    index = int(below[0])
    pair = slice(index - (index > 1), index + 1)
    return float(np.interp(-loss, -curve.loss[pair], curve.tokens_seen[pair]))


def mean_tokens_to_reach(arm: Arm, name: str, loss: float) -> int | None:
    """Mean over seeds; None where a seed never gets there. All tokens get there at their end."""
    if arm.is_control:
        return round(arm.mean(lambda run: run.lineage["tokens_seen"]))
    found = [tokens_to_reach(run.curves[name], loss) for run in arm.runs]
    reached = [tokens for tokens in found if tokens is not None]
    return round(float(np.mean(reached))) if len(reached) == len(found) else None


def table_rows(arms: Sequence[Arm], sets: Sequence[str], controls: Sequence[Run]) -> list[Json]:
    rows = [table_row(arm, name, controls) for arm in arms for name in sets]
    columns = dict.fromkeys((key for row in rows for key in row), None)
    return [columns | row for row in rows]


def table_row(arm: Arm, name: str, controls: Sequence[Run]) -> Json:
    losses = arm.losses(name)
    control = control_losses(controls, [name])
    reached = mean_tokens_to_reach(arm, name, control[name]) if control else None
    shared = set.intersection(*(set(costs(run)) for run in arm.runs))
    return (
        {
            "arm": arm.label,
            "rule": arm.runs[0].rule,
            "select_ratio": arm.select_ratio,
            "set": name,
            "windows": num_windows(arm.runs[0], name),
            "mean": round(float(np.mean(losses)), 6),
            "low": round(min(losses), 6),
            "high": round(max(losses), 6),
            "seeds": len(losses),
        }
        | against_all_tokens(arm, controls, name)
        | {
            "tokens_seen": round(arm.mean(lambda run: run.lineage["tokens_seen"])),
            "tokens_selected": round(arm.mean(lambda run: run.lineage["tokens_selected"])),
            "tokens_to_all_tokens_loss": reached,
        }
        | {key: arm.mean(lambda run, key=key: costs(run)[key]) for key in sorted(shared)}
    )


def num_windows(run: Run, name: str) -> int | None:
    """Of the held-out set, as many as were read; None where the run does not say."""
    known = run.lineage["heldout"]
    return known[name]["windows"] if name in known else None


def against_all_tokens(arm: Arm, controls: Sequence[Run], name: str) -> Json:
    """The difference with its interval over windows, and of the seeds that both have."""
    ends = ("", "_half_width", "_lowest_seed", "_highest_seed")
    keys = [f"minus_all_tokens{end}" for end in ends]
    if not controls or arm.is_control:
        return dict.fromkeys(keys)
    found = difference(arm, controls, name)
    seeds = [min(found.seeds), max(found.seeds)] if found.seeds else [None, None]
    values = [found.mean, found.half, *seeds]
    rounded = [None if value is None else round(value, 6) for value in values]
    return dict(zip(keys, rounded, strict=True))


def markdown(rows: Sequence[Json], sets: Sequence[str], left_out: dict[Path, str]) -> str:
    """One line an arm; of each set the loss, mean (lowest to highest), and what parts it."""
    by_arm: dict[str, dict[str, Json]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["set"]] = row
    minus = [f"minus all tokens, {name}" for name in sets]
    reach = [f"tokens to all tokens' loss, {name}" for name in sets]
    head = ["arm", *sets, *minus, "seeds", "tokens seen", "tokens selected", *reach]
    lines, places = [line_of(head), "| --- " * len(head) + "|"], digits(rows)
    minus_places = minus_digits(rows)
    for label, found in by_arm.items():
        row = found[sets[0]]
        counts = [f"{row[key]:,}" for key in ("seeds", "tokens_seen", "tokens_selected")]
        ends = [found[name]["tokens_to_all_tokens_loss"] for name in sets]
        texts = [spread_text(found[name], places[name]) for name in sets]
        texts += [minus_text(found[name], minus_places[name]) for name in sets]
        cells = [label, *texts, *counts]
        cells += ["" if end is None else f"{end:,}" for end in ends]
        lines.append(line_of(cells))
    of_seeds = ": mean over seeds (lowest to highest)" if has_seeds(rows) else ""
    lines += ["", f"Final held-out loss in nats per token{of_seeds}."]
    is_compared = any(row["minus_all_tokens"] is not None for row in rows)
    for note in [*([MINUS_NOTE] if is_compared else []), REACH_NOTE, *windows_notes(rows)]:
        lines += ["", note]
    lines.append("")
    lines += [f"Left out: `{folder}`: {reason}" for folder, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def has_seeds(rows: Sequence[Json]) -> bool:
    return any(row["seeds"] > 1 for row in rows)


def line_of(cells: Sequence[str]) -> str:
    """A bar in a name would end its cell."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def windows_notes(rows: Sequence[Json]) -> list[str]:
    known = {row["set"]: row["windows"] for row in rows if row["windows"] is not None}
    texts = ", ".join(f"{name}: {count:,}" for name, count in known.items())
    return [f"Held-out windows: {texts}."] if known else []


def digits(rows: Sequence[Json]) -> dict[str, int]:
    """Of a set's losses, alike in all rows: as many as seeds agree on and windows tell apart by."""
    spreads = [max(row["high"] - row["low"], 2 * (half_of(row) or 0)) for row in rows]
    return places_of(rows, spreads)


def minus_digits(rows: Sequence[Json]) -> dict[str, int]:
    """Of the differences: as their intervals allow, or else as the losses have."""
    halves = [half_of(row) or 0.0 for row in rows]
    return digits(rows) if not any(halves) else places_of(rows, halves)


def half_of(row: Json) -> float | None:
    return row["minus_all_tokens_half_width"]


def places_of(rows: Sequence[Json], spreads: Sequence[float]) -> dict[str, int]:
    """4 where no spread of the set is known."""
    found: dict[str, list[float]] = {row["set"]: [] for row in rows}
    for row, spread in zip(rows, spreads, strict=True):
        found[row["set"]] += [spread] if spread > 0 else []
    return {name: decimals(float(np.median(one)) if one else 0) for name, one in found.items()}


def spread_text(row: Json, places: int) -> str:
    mean, low, high = (f"{row[key]:.{places}f}" for key in ("mean", "low", "high"))
    return mean if row["seeds"] == 1 else f"{mean} ({low} to {high})"


def minus_text(row: Json, places: int) -> str:
    """-0.029 ± 0.006; empty for all tokens themselves."""
    value, half = row["minus_all_tokens"], half_of(row)
    interval = "" if half is None else f" ± {half:.{places}f}"
    return "" if value is None else f"{value:+.{places}f}{interval}"
