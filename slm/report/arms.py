"""Finished runs as the reports read them, and arms: the runs that differ in the seed alone.

What is read: model/slm.json, run.json and heldout.csv of each run; status.json where a job failed.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.errors import UserError
from slm.evaluate.losses import WindowLosses
from slm.selection.names import ALL_TOKENS, selection_name
from slm.selection.registry import in_words, rule_word, takes_all_tokens
from slm.store.files import Json, nested, read_json
from slm.train.curves import (
    USUAL,
    Curve,
    heldout_sets,
    read_curve,
    read_window_losses,
    run_folders,
)

log = logging.getLogger("slm.report")
SEEDS = {"seed", "selection.seed", "data.order"}  # what an order of the data is made of
HASH = re.compile(r"[0-9a-f]{64}")


class Run(NamedTuple):
    """What one finished run left."""

    folder: Path
    lineage: Json
    identity: Json  # run.json: all that makes it this run
    curves: dict[str, Curve]  # of each held-out set
    windows: Mapping[tuple[str, int], WindowLosses] = {}  # by held-out set and tokens seen

    def final_windows(self, name: str) -> WindowLosses | None:
        """Of the set; None where the run did not keep them."""
        key = name, int(self.curves[name].tokens_seen[-1])
        return self.windows[key] if key in self.windows else None

    @property
    def select_ratio(self) -> float | None:
        """None for a rule without one, and for a schedule."""
        selection = self.lineage["selection"]
        ratio = selection["select_ratio"] if "select_ratio" in selection else None
        return float(ratio) if isinstance(ratio, int | float) else None

    @property
    def order(self) -> tuple[int, str]:
        """Runs with one order of the data have one seed and one way to make the order of it."""
        return self.lineage["seed"], (USUAL | self.identity)["data.order"]

    @property
    def rule(self) -> str:
        return rule_word(self.lineage["selection"])

    @property
    def name(self) -> str:
        """Of its rule: excess k = 0.6"""
        return selection_name(self.lineage["selection"])

    @property
    def line(self) -> str:
        """The name without its ratio."""
        return self.name if self.name == ALL_TOKENS else self.rule

    @property
    def takes_all_tokens(self) -> bool:
        return takes_all_tokens(self.lineage["selection"])


class Arm(NamedTuple):
    """Runs that differ in nothing but the seed."""

    label: str
    line: str  # the label without its ratio: arms of one line are joined in the figure
    runs: list[Run]
    is_baseline: bool = False

    @property
    def select_ratio(self) -> float | None:
        return self.runs[0].select_ratio

    @property
    def takes_all_tokens(self) -> bool:
        return self.runs[0].takes_all_tokens

    @property
    def has_run(self) -> bool:
        """Or it is a model alone, which was evaluated."""
        return bool(self.runs[0].identity)

    @property
    def is_control(self) -> bool:
        return self.takes_all_tokens and not self.is_baseline

    def losses(self, name: str) -> list[float]:
        """Final loss of each seed."""
        return [float(run.curves[name].loss[-1]) for run in self.runs]

    def mean(self, value: Callable[[Run], float]) -> float:
        return float(np.mean([value(run) for run in self.runs]))


# ---- runs ---------------------------------------------------------------------------------------


def read_runs(folders: Sequence[str]) -> tuple[list[Run], dict[Path, str]]:
    """The finished runs in or below the folders; the others with the reason."""
    runs, left_out = [], {}
    for folder in run_folders(folders):
        reason = why_left_out(folder)
        if reason is None:
            runs.append(read_run(folder))
        else:
            left_out[folder] = reason
    return runs, left_out


def report_left_out(left_out: Mapping[Path, str]) -> None:
    for folder, reason in left_out.items():
        log.warning("left out: %s: %s", folder, reason)


def why_left_out(folder: Path) -> str | None:
    if not (folder / "model" / "slm.json").exists():
        path = folder / "status.json"
        status = read_json(path) if path.exists() else {"status": "", "error": ""}
        return f"failed: {status['error']}" if status["status"] == "failed" else "not complete"
    if not (folder / "heldout.csv").exists():
        return "has no heldout.csv (data.heldout or logger.csv was missing)"
    seen = read_json(folder / "model" / "slm.json")["lineage"]["tokens_seen"]
    for name in heldout_sets(folder):
        last = read_curve(folder, "", name).tokens_seen[-1]
        if last != seen:
            return f"heldout.csv ends at {last:,.0f} tokens, the run at {seen:,}"
    return None


def read_run(folder: Path) -> Run:
    record = read_json(folder / "model" / "slm.json")["lineage"]
    curves = {name: read_curve(folder, "", name) for name in heldout_sets(folder)}
    identity = read_identity(folder / "run.json")
    return Run(folder, record, identity, curves, read_window_losses(folder))


def read_identity(path: Path) -> Json:
    """With what is not written where it is the usual (slm/train/identity.py)."""
    return USUAL | {"model.backward": "exact"} | in_words(read_json(path))


def check_same(runs: Sequence[Run], what: str, value: Callable[[Run], Any]) -> None:
    """A difference between arms must come from the selection."""
    first = runs[0]
    for run in runs:
        if value(run) != value(first):
            raise UserError(
                f"{what} of {first.folder} is {value(first)}, of {run.folder} {value(run)}: "
                "runs of one report must agree in it, others can be `baselines`"
            )


def check_runs(runs: Sequence[Run]) -> None:
    check_same(runs, "the corpus", lambda run: run.lineage["corpus_fingerprint"])
    check_same(runs, "tokens_seen", lambda run: run.lineage["tokens_seen"])
    check_same(runs, "the held-out sets", lambda run: sorted(run.curves))
    others = [run for run in runs if run.order[1] != runs[0].order[1]]
    if others:
        log.warning(
            "data.order of %s is %s, of %s %s: they saw other windows at the same seed, and are "
            "not compared seed by seed",
            *(runs[0].folder, runs[0].order[1], others[0].folder, others[0].order[1]),
        )


def check_heldout(runs: Sequence[Run], sets: Sequence[str]) -> None:
    """Losses on other windows cannot be compared."""
    for name in sets:
        known = [(run, text) for run in runs if (text := heldout_text(run, name)) is not None]
        for run, text in known:
            first, expected = known[0]
            if text != expected:
                raise UserError(
                    f"held-out set {name!r} of {first.folder} is {expected}, of {run.folder} "
                    f"{text}: runs and baselines of one report must be evaluated on the same "
                    "windows, leave out the run or the set (sets=[...])"
                )


def heldout_text(run: Run, name: str) -> str | None:
    """512 windows (fingerprint 1f0c...); None for a set that the run's last start did not have."""
    if name not in run.lineage["heldout"]:
        return None
    entry = run.lineage["heldout"][name]
    return f"{entry['windows']} windows (fingerprint {entry['fingerprint']})"


# ---- arms ---------------------------------------------------------------------------------------


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """In the order of their lines and ratios."""
    arms = grouped(runs)
    for arm in arms:
        check_seeds(arm.runs)
    return arms


def grouped(runs: Sequence[Run]) -> list[Arm]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        # A field that is null is one that an earlier build did not know, as in adopt_run.
        stated = {key: value for key, value in run.identity.items() if value is not None}
        fields = {key: value for key, value in stated.items() if key not in SEEDS}
        groups[json.dumps(fields, sort_keys=True)].append(run)
    keys = line_keys([group[0] for group in groups.values()])
    arms = []
    for group in groups.values():
        name, line = group[0].name, group[0].line
        detail = details(group[0], keys[line])
        arms.append(Arm(name + detail, line + detail, group))
    return sorted(arms, key=lambda arm: (arm.line, arm.select_ratio or 0, arm.label))


def line_keys(firsts: Sequence[Run]) -> dict[str, list[str]]:
    """What tells the arms of a line apart; of the selection, what arms of one name differ in."""
    by_name: dict[tuple[str, str], list[Run]] = defaultdict(list)
    by_line: dict[str, list[Run]] = defaultdict(list)
    for run in firsts:
        by_name[run.line, run.name].append(run)
        by_line[run.line].append(run)
    keys = {
        line: {key for key in differing_keys(runs) if not key.startswith("selection.")}
        for line, runs in by_line.items()
    }
    for (line, _), runs in by_name.items():
        keys[line].update(differing_keys(runs))
    return {line: sorted(found) for line, found in keys.items()}


def arm_labels(folders: Sequence[Path]) -> dict[Path, str]:
    """Of runs that say what they select with, finished or not, in the order of the arms."""
    records = {path: path / "run.json" for path in folders if (path / "run.json").exists()}
    found = {path: read_identity(record) for path, record in records.items()}
    runs = [
        Run(path, {"selection": nested(identity, "selection.")}, identity, {})
        for path, identity in found.items()
        if "selection.rule" in identity
    ]
    return {run.folder: arm.label for arm in grouped(runs) for run in arm.runs}


def check_seeds(runs: Sequence[Run]) -> None:
    seeds: dict[Any, Path] = {}
    for run in runs:
        if run.order in seeds:
            first = seeds[run.order]
            raise UserError(
                f"{first} and {run.folder} are the same run with seed {run.lineage['seed']}"
            )
        seeds[run.order] = run.folder


def details(run: Run, keys: Sequence[str]) -> str:
    """The fields in which arms of one name differ, `keys`: `, scope=sequence`

    What is empty (no references, no online reference) is named only where nothing else is.
    """
    names = short_names(keys)
    empty = [key for key in keys if is_empty(run, key)]
    stated = [key for key in keys if key not in empty]
    if not stated:
        return "".join(f", no {names[key]}" for key in empty)
    return "".join(f", {names[key]}={text_of(run.identity[key], key)}" for key in stated)


def differing_keys(others: Sequence[Run]) -> list[str]:
    keys = sorted({key for other in others for key in other.identity} - SEEDS)
    texts = {key: {value_text(other, key) for other in others} for key in keys}
    return [key for key in keys if len(texts[key]) > 1]


def value_text(run: Run, key: str) -> str:
    return "" if is_empty(run, key) else text_of(run.identity[key], key)


def is_empty(run: Run, key: str) -> bool:
    return key not in run.identity or run.identity[key] in (None, [])


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """lr for optimizer.adamw.lr, unless two fields end in it."""
    ends = [key.split(".")[-1] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def text_of(value: Any, key: str) -> str:
    """Hashes are cut: eight characters tell them apart."""
    if key == "selection.select_ratio.points":
        return " → ".join(f"{ratio:g} at {tokens}" for tokens, ratio in value)
    if isinstance(value, list):
        return "+".join(text_of(item, "") for item in value)
    return value[:8] if isinstance(value, str) and HASH.fullmatch(value) else str(value)


# ---- costs --------------------------------------------------------------------------------------


def costs(run: Run) -> dict[str, float]:
    """What the run says it cost, and what its references did; absent where one was not measured.

    References that a rule only logs are none of its costs.
    """
    record = run.lineage
    stores = record["references"] if record["needs_references"] else []
    scoring = [store["scoring_cost"] for store in stores]
    training = [store["model_lineage"] for store in stores]
    found = {
        "train_seconds": total([record], "train_seconds"),
        "train_flops": total([record], "train_flops"),
        "score_seconds": total(scoring, "seconds"),
        "score_flops": total(scoring, "flops"),
        "reference_train_seconds": total(training, "train_seconds"),
        "reference_train_flops": total(training, "train_flops"),
    }
    return {name: value for name, value in found.items() if value is not None}


def total(records: Sequence[Json | None], field: str) -> float | None:
    """None where there is nothing to sum, or one of them is unknown: the sum would be too small."""
    known = [record[field] for record in records if record is not None]
    complete = bool(records) and len(known) == len(records) and None not in known
    return sum(known) if complete else None
