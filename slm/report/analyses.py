"""Which runs' token losses are shown, under which names: read for the page and the figures."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slm.console import progress
from slm.dynamics.analysis import Analysis, analyse, run_chooser, store_folders
from slm.dynamics.classes import MIN_CHECKPOINTS
from slm.dynamics.figure import picks
from slm.dynamics.trajectories import TrajectoryStore
from slm.errors import UserError
from slm.report.arms import arm_labels
from slm.store.files import read_json
from slm.train.curves import run_folders

log = logging.getLogger("slm.report")


class Store(NamedTuple):
    """Of token losses."""

    folder: Path
    name: str  # of its run
    arm: str


def read_analyses(stores: Sequence[Store], check: str) -> list[Analysis]:
    """Damaged ones are named."""
    total = sum(len(TrajectoryStore(store.folder).checkpoints) for store in stores)
    with progress("token dynamics", total, "checkpoints") as advance:
        found = []
        for store in stores:
            try:
                found.append(read_analysis(store, check, advance))
            except UserError as error:
                log.warning("left out: the token losses of %s: %s", store.name, error)
        return found


def all_stores(folders: Sequence[str]) -> list[Store]:
    """Of the runs, finished or not; too short or damaged ones are named."""
    runs = run_folders(folders)
    stores = [(run, store) for run in runs for store in store_folders(run)]
    whole = [(run, folder) for run, folder in stores if can_be_shown(folder)]
    names = analysis_names(whole, arm_labels(runs))
    return [Store(folder, *mine) for (_, folder), mine in zip(whole, names, strict=True)]


def chosen_stores(stores: Sequence[Store], most: int) -> list[Store]:
    """A run of each arm before a second of any; of arms that are too many some, evenly spread."""
    turns: dict[int, list[Store]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    for store in stores:
        turns[seen[store.arm]].append(store)
        seen[store.arm] += 1
    chosen: set[Path] = set()
    for turn in turns.values():
        room = most - len(chosen)
        chosen |= {turn[index].folder for index in picks(len(turn), room)} if room > 0 else set()
    return [store for store in stores if store.folder in chosen]


def chosen_note(stores: Sequence[Store], chosen: Sequence[Store]) -> list[str]:
    if len(chosen) == len(stores):
        return []
    arms, shown = (len({store.arm for store in some}) for some in (stores, chosen))
    text = (
        f"{len(stores)} runs in {many(arms, 'arm')} have token losses; {len(chosen)} of them, in "
        f"{many(shown, 'arm')}, are shown (max_dynamics), one seed of each arm before a second: "
        + "; ".join(store.name for store in chosen)
    )
    log.warning("%s", text)
    return [text]


def can_be_shown(folder: Path) -> bool:
    try:
        count = len(TrajectoryStore(folder).checkpoints)
    except UserError as error:
        log.warning("left out: %s", error)
        return False
    if count < MIN_CHECKPOINTS:
        log.warning(
            "left out: %s has %d checkpoints, a trajectory needs %d",
            *(folder, count, MIN_CHECKPOINTS),
        )
    return count >= MIN_CHECKPOINTS


def read_analysis(found: Store, check: str, advance: Callable[[int], None]) -> Analysis:
    """With the threshold and the level that the classes were made with."""
    store = TrajectoryStore(found.folder, check)
    run_chooser(store, warns=True)
    return analyse(store, found.name, **store.settings, arm=found.arm, advance=advance)


def analysis_names(
    stores: Sequence[tuple[Path, Path]], arms: Mapping[Path, str]
) -> list[tuple[str, str]]:
    """Of (run, store): the run's name and its arm's, with the store's where the run has several."""
    runs = [run for run, _ in stores]
    names = short_paths(runs) | job_names(runs, arms)
    found = [(names[run], arms[run] if run in arms else names[run]) for run in runs]
    return [
        (f"{name}, {folder.name}", f"{arm}, {folder.name}") if runs.count(run) > 1 else (name, arm)
        for (run, folder), (name, arm) in zip(stores, found, strict=True)
    ]


def job_names(runs: Sequence[Path], arms: Mapping[Path, str]) -> dict[Path, str]:
    """excess k = 0.4, seed 0 for the jobs of a sweep; others have their user's names."""
    jobs = [run for run in dict.fromkeys(runs) if "=" in run.name and run in arms]
    names = {run: f"{arms[run]}, seed {read_json(run / 'run.json')['seed']}" for run in jobs}
    taken = list(names.values())
    return {run: name for run, name in names.items() if taken.count(name) == 1}


def short_paths(folders: Sequence[Path]) -> dict[Path, str]:
    """The last names of each path, as many as tell it from the others."""
    found, depth = {}, 0
    todo = list(dict.fromkeys(folders))
    while todo:
        depth += 1
        ends = {folder: "/".join(folder.parts[-depth:]) for folder in todo}
        taken = list(ends.values())
        found |= {folder: end for folder, end in ends.items() if taken.count(end) == 1}
        todo = [folder for folder in todo if folder not in found]
    return found


def many(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"
