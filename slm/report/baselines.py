"""What else could be done, as arms of one report: other runs, and models without a run.

What was not evaluated on the windows of the runs, such as a reference with a budget of its own, is
evaluated here, on these and in the precision of the runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from slm.command_keys import PRECISIONS
from slm.errors import UserError
from slm.evaluate.command import evaluated
from slm.evaluate.losses import WindowLosses
from slm.model.folder import init_identity
from slm.report.arms import Arm, Run, arms_of, heldout_text, read_runs, report_left_out
from slm.selection.names import ALL_TOKENS
from slm.stage import Folder
from slm.store.files import Json, read_json
from slm.store.hub import check_model_folder, is_folder
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

    heldout: the corpora of the sets: what was not evaluated on the windows of the runs is, here
    """
    folders = {label: str(folder) for label, folder in named.items()}
    arms = [
        run_arm(label, folder) if has_losses(Path(folder)) else model_arm(label, model_in(folder))
        for label, folder in folders.items()
    ]
    check_sets([arm for arm in arms if arm.has_run], sets)
    like = max(runs, key=lambda run: len(run.lineage["heldout"]))  # an older one may say nothing
    texts = {arm.label: other_windows(arm, like, sets) for arm in arms}
    others = [arm for arm in arms if texts[arm.label]]
    if not others:
        return arms
    corpora = heldout_corpora(others[0].label, texts[others[0].label], like, sets, heldout)
    again = {arm.label: arm for arm in evaluated_again(others, like, corpora)}
    return [again[arm.label] if arm.label in again else arm for arm in arms]


def model_in(folder: str) -> str:
    """The model of a finished run that evaluated nothing, such as a reference; else the folder."""
    run = Path(folder)
    is_bare = (run / "model" / "slm.json").is_file() and not (run / "heldout.csv").exists()
    return str(run / "model") if is_bare else folder


def has_losses(folder: Path) -> bool:
    return bool(runs_below(folder)) and model_in(str(folder)) == str(folder)


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


def model_arm(label: str, folder: str) -> Arm:
    """Of a model without a run: evaluated nowhere."""
    if is_folder(f"baseline {label!r}:", folder):
        check_model_folder(f"baseline {label!r}:", folder)
    path = Path(folder) / "slm.json"
    known = read_json(path)["lineage"] if path.is_file() else {}
    run = Run(Path(folder), NO_RUN | known | {"heldout": {}}, {}, {})
    return Arm(label, label, [run], is_baseline=True)


def begun_with(arm: Arm, run: Run) -> bool:
    """Whether a model without a run is what the run began with."""
    folder = str(arm.runs[0].folder)
    return init_identity("baseline", folder) == run.identity["init_from"]


# ---- on the windows of the runs -----------------------------------------------------------------


def other_windows(arm: Arm, like: Run, sets: Sequence[str]) -> str:
    """Why the arm's losses are not those of `like`'s windows; empty where they are."""
    if not arm.has_run:
        return "has no held-out losses of its own"
    for run in arm.runs:
        for name in sets:
            mine, theirs = heldout_text(run, name), heldout_text(like, name)
            if None not in (mine, theirs) and mine != theirs:
                return f"was evaluated on {mine} of {name!r}, {like.folder} on {theirs}"
    return ""


def heldout_corpora(
    label: str, why: str, like: Run, sets: Sequence[str], heldout: Mapping[str, Folder]
) -> dict[str, Corpus]:
    """UserError where they are not the runs' own."""
    known = like.lineage["heldout"]
    for name in sets:
        if name not in heldout:
            raise UserError(
                f"baseline {label!r} {why}: name the corpus of the held-out set, heldout={{{name}: "
                "FOLDER}, and the report evaluates it on the windows of the runs; or leave it out"
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


def evaluated_again(arms: Sequence[Arm], like: Run, corpora: Mapping[str, Corpus]) -> Iterator[Arm]:
    """On the windows of `like`, in its precision."""
    folders = {str(model_of(run)): str(model_of(run)) for arm in arms for run in arm.runs}
    windows = {name: like.lineage["heldout"][name]["windows"] for name in corpora}
    precision = like.lineage["precision"] if "precision" in like.lineage else "32-true"
    found = evaluated(folders, corpora, windows, BATCH_SIZE, PRECISIONS[precision])
    for arm in arms:
        losses = [{name: found[str(model_of(run)), name] for name in corpora} for run in arm.runs]
        runs = [measured(*pair, like) for pair in zip(arm.runs, losses, strict=True)]
        yield arm._replace(runs=runs)


def model_of(run: Run) -> Path:
    return run.folder / "model" if run.identity else run.folder


def measured(run: Run, found: Mapping[str, WindowLosses], like: Run) -> Run:
    """With these losses alone, at its end."""
    record = run.lineage | {"heldout": like.lineage["heldout"]}
    seen = record["tokens_seen"]
    curves = {
        name: Curve("", np.array([seen]), np.array([losses.total().loss]))
        for name, losses in found.items()
    }
    windows = {(name, seen): losses for name, losses in found.items()}
    return run._replace(lineage=record, curves=curves, windows=windows)


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
