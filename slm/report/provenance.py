"""What went into each arm: what all share, what differs, and what it cost.

Settings are those of run.json; the model, the data, the machine and the versions of what ran there
are those of model/slm.json.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from slm.report.arms import SEEDS, Arm, Run, costs, is_empty, short_names, text_of
from slm.store.files import Json
from slm.train.lineage import named_references

ELSEWHERE = SEEDS | {"seal", "selection"}  # the selection is among the settings
COUNTED = {"tokens_seen", "tokens_selected", "train_seconds", "train_flops"}  # in the table
COUNTED |= {"needs_references"}  # the rule says it
HASHES = ("_fingerprint", "_sha256")


class Provenance(NamedTuple):
    shared: dict[str, str]
    columns: list[str]  # what differs, and what it cost
    arms: dict[str, list[str]]  # a text a column, "" where an arm has none


def provenance(arms: Sequence[Arm]) -> Provenance:
    """Values that the seeds of an arm do not share stand side by side."""
    found = {arm.label: joined([facts(run) for run in arm.runs]) for arm in arms}
    keys = dict.fromkeys(key for texts in found.values() for key in texts)
    values = {key: [filled(texts, key) for texts in found.values()] for key in keys}
    apart = [key for key in keys if len(set(values[key])) > 1]
    differing = [key for key in apart if not is_hash_of_a_column(key, values)]
    names = short_names(list(keys))
    spent = {arm.label: joined([cost_texts(run) for run in arm.runs]) for arm in arms}
    paid = list(dict.fromkeys(key for texts in spent.values() for key in texts))
    return Provenance(
        {names[key]: values[key][0] for key in keys if key not in apart},
        [*(names[key] for key in differing), *paid],
        {
            label: [filled(found[label] | spent[label], key) for key in [*differing, *paid]]
            for label in found
        },
    )


def is_hash_of_a_column(key: str, values: Mapping[str, Sequence[str]]) -> bool:
    """corpus_fingerprint tells arms apart as corpus does, and says less."""
    names = [key.removesuffix(end) for end in HASHES if key.endswith(end)]
    return any(name in values and parts(values[name]) == parts(values[key]) for name in names)


def parts(texts: Sequence[str]) -> list[int]:
    """Which of them are alike."""
    return [texts.index(text) for text in texts]


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
    found = settings | flat(record | {"references": reference_texts(run.lineage)})
    return {key: text_of(value, key) for key, value in found.items() if key not in ELSEWHERE}


def reference_texts(lineage: Json) -> list[str]:
    """1f0c3d5e of curated/train: a model's hash alone says little."""
    models = [store["model_lineage"] for store in lineage["references"]]
    made_of = [f" of {model['corpus']}" if model and "corpus" in model else "" for model in models]
    named = [text_of(name, "") for name in named_references(lineage)]
    return [name + of for name, of in zip_longest(named, made_of, fillvalue="")]


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
