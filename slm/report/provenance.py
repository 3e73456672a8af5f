"""What went into each arm: what all share, what differs, and what it cost.

Settings are those of run.json; the model, the data, the machine and the versions of what ran there
are those of model/slm.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slm.report.arms import SEEDS, Arm, Run, costs, is_empty, short_names, text_of
from slm.store.files import Json
from slm.train.lineage import named_references

ELSEWHERE = SEEDS | {"seal", "selection"}  # the selection is among the settings
COUNTED = {"tokens_seen", "tokens_selected", "train_seconds", "train_flops"}  # in the table


class Provenance(NamedTuple):
    shared: dict[str, str]
    columns: list[str]  # what differs, and what it cost
    arms: dict[str, list[str]]  # a text a column, "" where an arm has none


def provenance(arms: Sequence[Arm]) -> Provenance:
    """Values that the seeds of an arm do not share stand side by side."""
    found = {arm.label: joined([facts(run) for run in arm.runs]) for arm in arms}
    keys = dict.fromkeys(key for texts in found.values() for key in texts)
    values = {key: [filled(texts, key) for texts in found.values()] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1]
    names = short_names(list(keys))
    spent = {arm.label: joined([cost_texts(run) for run in arm.runs]) for arm in arms}
    paid = list(dict.fromkeys(key for texts in spent.values() for key in texts))
    return Provenance(
        {names[key]: values[key][0] for key in keys if key not in differing},
        [*(names[key] for key in differing), *paid],
        {
            label: [filled(found[label] | spent[label], key) for key in [*differing, *paid]]
            for label in found
        },
    )


def run_rows(arms: Sequence[Arm]) -> list[Json]:
    """A row a run with all of its facts."""
    rows = [
        {"arm": arm.label, "run": run.folder.name, "seed": run.lineage["seed"]} | facts(run)
        for arm in arms
        for run in arm.runs
    ]
    columns = dict.fromkeys((key for row in rows for key in row), "")
    return [columns | row for row in rows]


def joined(runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    keys = dict.fromkeys(key for run in runs for key in run)
    return {key: " / ".join(dict.fromkeys(filled(run, key) for run in runs)) for key in keys}


def filled(texts: Mapping[str, str], key: str) -> str:
    return texts[key] if key in texts else ""


def facts(run: Run) -> dict[str, str]:
    """Of names and hashes of one thing, a model or a corpus, the name."""
    settings = {key: value for key, value in run.identity.items() if not is_empty(run, key)}
    record = {key: value for key, value in run.lineage.items() if key not in COUNTED}
    found = settings | flat(record | {"references": named_references(run.lineage)})
    return {key: text_of(value, key) for key, value in found.items() if key not in ELSEWHERE}


def flat(tree: Mapping[str, Any], prefix: str = "") -> Json:
    """{"packages": {"torch": "2"}} -> {"packages.torch": "2"}; what is empty is left out."""
    found: Json = {}
    for key, value in tree.items():
        if prefix + key in ELSEWHERE:
            continue
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value not in (None, []):
            found[prefix + key] = value
    return found


def cost_texts(run: Run) -> dict[str, str]:
    """train_flops -> "train FLOPs": "1.4e14"; seconds as they are."""
    return {
        key.replace("_", " ").replace("flops", "FLOPs"): f"{value:.1e}"
        if key.endswith("flops")
        else f"{value:,.0f}"
        for key, value in costs(run).items()
    }
