"""What else could be done, as arms of one report: other runs, and models without a run.

A model without a run is evaluated here, on the windows and in the precision of the runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slm.command_keys import PRECISIONS
from slm.errors import UserError
from slm.evaluate.command import evaluated
from slm.evaluate.losses import WindowLosses
from slm.model.folder import check_model_folder
from slm.report.arms import Arm, Run, arms_of, read_runs, report_left_out
from slm.selection.names import ALL_TOKENS
from slm.stage import Folder
from slm.store.files import Json, read_json
from slm.store.hub import is_folder
from slm.store.shards import Corpus
from slm.train.curves import Curve, runs_below

BEFORE = "before training"
BATCH_SIZE = 8  # windows of one forward
NO_RUN: Json = {
    "selection": {"rule": ""},
    "seed": 0,
    "needs_references": False,
    "online_reference": None,
    "references": [],
    "tokens_seen": 0,
    "tokens_selected": 0,
    "train_seconds": None,
    "train_flops": None,
}


def before_training(runs: Sequence[Run], sets: Sequence[str]) -> list[Arm]:
    """The model that all runs began with, where they began with one and measured it."""
    started = {run.identity["init_from"] if "init_from" in run.identity else None for run in runs}
    first = runs[0]
    curves = {name: first.curves[name] for name in sets}
    if len(started) > 1 or None in started or any(c.tokens_seen[0] for c in curves.values()):
        return []
    record = NO_RUN | {"heldout": first.lineage["heldout"]}
    points = {name: Curve("", c.tokens_seen[:1], c.loss[:1]) for name, c in curves.items()}
    run = first._replace(lineage=record, identity={}, curves=points)
    return [Arm(BEFORE, BEFORE, [run], is_baseline=True)]


def read_baselines(
    named: Mapping[str, Folder],
    runs: Sequence[Run],
    sets: Sequence[str],
    heldout: Mapping[str, Folder],
) -> list[Arm]:
    """One arm each, under the name that it was given; corpus and budget may be others.

    heldout: the corpora of the sets, for models without a run
    """
    folders = {label: str(folder) for label, folder in named.items()}
    is_run = {label: bool(runs_below(Path(folder))) for label, folder in folders.items()}
    models = {label: folder for label, folder in folders.items() if not is_run[label]}
    arms = {label: run_arm(label, folders[label]) for label in folders if is_run[label]}
    check_sets(list(arms.values()), sets)
    if models:
        arms |= model_arms(models, runs[0], sets, heldout)
    return [arms[label] for label in folders]


def run_arm(label: str, folder: str) -> Arm:
    runs, left_out = read_runs([folder])
    report_left_out(left_out)
    found = arms_of(runs)
    if len(found) != 1:
        names = [arm.label for arm in found]
        reasons = "; ".join(left_out.values())
        raise UserError(
            f"baseline {label!r} must be one finished arm, {folder} has {names or 'none'}"
            + (f" ({reasons})" if reasons else "")
        )
    return Arm(label, label, runs, is_baseline=True)


# ---- models without a run -----------------------------------------------------------------------


def model_arms(
    models: Mapping[str, str], like: Run, sets: Sequence[str], heldout: Mapping[str, Folder]
) -> dict[str, Arm]:
    """Evaluated as `like` was."""
    for label, folder in models.items():
        if is_folder(f"baseline {label!r}:", folder):
            check_model_folder(f"baseline {label!r}:", folder)
    corpora = heldout_corpora(next(iter(models.items())), like, sets, heldout)
    windows = {name: like.lineage["heldout"][name]["windows"] for name in sets}
    precision = like.lineage["precision"] if "precision" in like.lineage else "32-true"
    found = evaluated(models, corpora, windows, BATCH_SIZE, PRECISIONS[precision])
    return {
        label: model_arm(label, folder, like, {name: found[label, name] for name in sets})
        for label, folder in models.items()
    }


def heldout_corpora(
    model: tuple[str, str], like: Run, sets: Sequence[str], heldout: Mapping[str, Folder]
) -> dict[str, Corpus]:
    """UserError where they are not the runs' own."""
    known = like.lineage["heldout"]
    for name in sets:
        if name not in heldout:
            raise UserError(
                f"baseline {model[0]!r} ({model[1]}) is a model without a run, which the report "
                f"evaluates: name the corpus of the held-out set, heldout={{{name}: FOLDER}}"
            )
        if name not in known:
            raise UserError(f"{like.folder} does not say which windows of {name!r} it read")
    corpora = {name: Corpus.open(heldout[name]) for name in sets}
    for name, corpus in corpora.items():
        if corpus.fingerprint != known[name]["fingerprint"]:
            raise UserError(
                f"heldout.{name}: {corpus.folder} has the fingerprint {corpus.fingerprint}, the "
                f"held-out set {name!r} of {like.folder} {known[name]['fingerprint']}"
            )
    return corpora


def model_arm(label: str, folder: str, like: Run, found: Mapping[str, WindowLosses]) -> Arm:
    path = Path(folder) / "slm.json"
    known = read_json(path)["lineage"] if path.is_file() else {}
    record = NO_RUN | known | {"heldout": like.lineage["heldout"]}
    seen = record["tokens_seen"]
    curves = {
        name: Curve("", np.array([seen]), np.array([losses.total().loss]))
        for name, losses in found.items()
    }
    windows = {(name, seen): losses for name, losses in found.items()}
    return Arm(label, label, [Run(Path(folder), record, {}, curves, windows)], is_baseline=True)


# ---- what fits together -------------------------------------------------------------------------


def check_names(arms: Sequence[Arm], baselines: Sequence[Arm]) -> None:
    """One name is one row of the table and one line of a figure."""
    taken = {ALL_TOKENS, *(arm.label for arm in arms)}
    for arm in baselines:
        if arm.label in taken:
            raise UserError(
                f"baseline {arm.label!r} ({arm.runs[0].folder}) has the name of an arm, or of the "
                f"control: choose another than {sorted(taken)}"
            )


def sets_of(arm: Arm) -> set[str]:
    return set.intersection(*(set(run.curves) for run in arm.runs))


def check_sets(baselines: Sequence[Arm], sets: Sequence[str]) -> None:
    shared = [name for name in sets if all(name in sets_of(arm) for arm in baselines)]
    advice = f"name the sets that all have, sets=[{', '.join(shared)}]"
    for arm in baselines:
        lacking = set(sets) - sets_of(arm)
        if lacking:
            raise UserError(
                f"baseline {arm.label!r} ({arm.runs[0].folder}) was not evaluated on "
                f"{sorted(lacking)}, only on {sorted(sets_of(arm))}: "
                + (advice if shared else "no set is left that all have, leave the baseline out")
            )
