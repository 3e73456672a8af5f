"""What a selection is called, in every table, figure and message: `excess k = 0.6`."""

from collections.abc import Mapping, Sequence
from typing import Any

from slm.selection.registry import by_word

ALL_TOKENS = "all tokens"


def selection_name(selection: Mapping[str, Any]) -> str:
    """all tokens, softmax, excess k = 1 → 0.6 (linear), loss min_loss = 2, forget replace k = 0.9

    What does not fit into it (temperatures, smoothing) stands in the run's record.
    """
    record = by_word(selection)
    if record["rule"] == "all":
        return ALL_TOKENS
    bounds = [f"{key} = {value}" for key, value in record.items() if is_bound(key, value)]
    has_ratio = "select_ratio" in record and record["select_ratio"] is not None
    ratio = [ratio_name(record["select_ratio"])] if has_ratio else []
    mode = [record["mode"]] if "mode" in record and record["mode"] != "mask" else []
    return " ".join([record["rule"], *mode, *ratio, *bounds])


def is_bound(key: str, value: Any) -> bool:
    return key.startswith(("min_", "max_")) and value is not None


def ratio_name(ratio: Any) -> str:
    """Of a number or a schedule; whatever else a folder says is shown as it is."""
    if isinstance(ratio, Mapping) and {"points", "shape"} <= ratio.keys():
        if is_course(ratio["points"]):
            return f"k = {course([value for _, value in ratio['points']])} ({ratio['shape']})"
    return f"k = {ratio:g}" if isinstance(ratio, int | float) else f"k = {ratio}"


def is_course(points: Any) -> bool:
    pairs = isinstance(points, list) and all(isinstance(one, list) for one in points)
    return pairs and all(len(one) == 2 and isinstance(one[1], int | float) for one in points)


def course(ratios: Sequence[float]) -> str:
    """1 → 0.6; the ones between are not named where there are many."""
    if len(ratios) <= 4:
        return " → ".join(f"{ratio:g}" for ratio in ratios)
    return f"{ratios[0]:g} → {ratios[-1]:g} in {len(ratios)} points"
