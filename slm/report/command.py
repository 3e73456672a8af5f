"""Finished runs -> tables and figures with the controls in them: `slm report` (see --help).

    report.html                 all of it on one page that needs no network, token dynamics too
    runs.csv                    settings, data, models, machine, versions of every run
    table.csv, table.md         every arm on every held-out set: mean, lowest and highest over seeds
    loss_vs_k.png, .svg         final loss against select_ratio, a line a rule
    loss_vs_tokens.png, .svg    loss during training, a panel a rule; with more than 8 panels a
                                picture a held-out set, loss_vs_tokens_<set>.png, .svg
    figures/                    the paper's figures of every run with token losses (dynamics/),
                                see figures.py
    truth.csv, truth_kept.csv   how well scores tell signal from noise, and what the rule keeps of
                                each, where the tokens are labelled, see truth.py
    made.json                   the hashes of all these: a report takes the place of an earlier one,
                                whole, and of nothing else, see own_files.py

Runs that differ in nothing but their seed are an arm, see arms.py. Runs that are not complete are
named and left out of the tables; their token losses so far are shown.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm.command_keys import REPORT
from slm.console import progress
from slm.dynamics.analysis import Analysis, analyse, run_chooser, store_folders
from slm.dynamics.classes import MIN_CHECKPOINTS
from slm.dynamics.figure import Figure, picks
from slm.dynamics.figures import Kind, made
from slm.dynamics.trajectories import TrajectoryStore
from slm.dynamics.truth import kept_rows, truth_rows
from slm.errors import UserError
from slm.names import file_name
from slm.report.arms import (
    Arm,
    Run,
    arm_labels,
    arms_of,
    check_heldout,
    check_runs,
    read_runs,
)
from slm.report.page.page import SweepFigures, write_page
from slm.report.paper.figures import paper_figures
from slm.report.paper.plots import draw
from slm.report.provenance import provenance, run_rows
from slm.report.sweep_figures import SWEEP_FIGURES, Sweep
from slm.report.table import REACH_NOTE, control_losses, markdown, table_rows
from slm.selection.names import ALL_TOKENS
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.files import Json, atomic_file, read_json, write_csv
from slm.store.own_files import check_own, replacing
from slm.train.curves import folders_of, run_folders

log = logging.getLogger("slm.report")
MADE_BY = "slm report"
MAX_PANELS = 8  # in one picture
MOST_BYTES = 150  # of a set's name in a file's


# ---- runs ---------------------------------------------------------------------------------------


def read_baselines(folders: Mapping[str, Any], sets: Sequence[str]) -> list[Arm]:
    """One arm each, under the name that it was given; corpus and budget may be others."""
    arms = []
    for label, folder in folders.items():
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
        arms.append(Arm(label, label, runs, is_baseline=True))
    check_sets(arms, sets)
    return arms


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


# ---- the figures --------------------------------------------------------------------------------


def draw_sweep(figures: Mapping[Kind, Figure], out: Path) -> None:
    """One picture a figure, or one a group of its panels where they are too many for one."""
    for kind, figure in figures.items():
        groups = list(dict.fromkeys(panel.group for panel in figure.panels))
        if len(figure.panels) <= MAX_PANELS or groups == [""]:
            draw(figure, out / f"{kind.name}.png")
            continue
        for group in groups:
            mine = figure._replace(panels=[p for p in figure.panels if p.group == group])
            draw(mine, out / f"{kind.name}_{file_name(group, MOST_BYTES)}.png")


# ---- the command --------------------------------------------------------------------------------


def chosen_sets(runs: Sequence[Run], wanted: Any) -> list[str]:
    known = list(runs[0].curves)
    if not known:
        raise UserError(f"{runs[0].folder}/heldout.csv has no held-out loss")
    if wanted is None:
        return known
    unknown = set(wanted) - set(known)
    if unknown:
        raise UserError(f"sets names {sorted(unknown)}, the runs were evaluated on {known}")
    return list(wanted)


def report_left_out(left_out: dict[Path, str]) -> None:
    for folder, reason in left_out.items():
        log.warning("left out: %s: %s", folder, reason)


def sweep_report(
    runs: Sequence[Run], left_out: dict[Path, str], wanted: Any, named: Mapping[str, Any], out: Path
) -> SweepFigures:
    """Write the tables and figures of finished runs."""
    check_runs(runs)
    sets, arms = chosen_sets(runs, wanted), arms_of(runs)
    control = control_losses(arms, sets)
    if not control:
        log.warning("no run trains on all tokens (selection=all or select_ratio=1): no control")
    baselines = read_baselines(named, sets)
    check_names(arms, baselines)
    check_heldout([run for arm in (*arms, *baselines) for run in arm.runs], sets)
    rows = table_rows([*arms, *baselines], sets, control)
    write_csv(out / "table.csv", rows)
    with atomic_file(out / "table.md") as file:
        file.write(markdown(rows, sets, left_out).encode())
    figures = made(SWEEP_FIGURES, Sweep(arms, baselines, control, sets))
    draw_sweep(figures, out)
    notes = [f"Left out: {folder}: {reason}" for folder, reason in left_out.items()]
    found = provenance([*arms, *baselines])
    write_csv(out / "runs.csv", run_rows([*arms, *baselines]))
    return SweepFigures(figures, sets, rows, [REACH_NOTE, *notes], found, counted(arms, baselines))


def counted(arms: Sequence[Arm], baselines: Sequence[Arm]) -> str:
    """12 runs in 4 arms, 3 seeds each; 1 baseline"""
    seeds = sorted({len(arm.runs) for arm in arms})
    runs = sum(len(arm.runs) for arm in arms)
    each = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    each += " seed each" if seeds == [1] else " seeds each"
    more = f"; {many(len(baselines), 'baseline')}" if baselines else ""
    return f"{many(runs, 'run')} in {many(len(arms), 'arm')}, {each}{more}"


def many(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


# ---- token dynamics -----------------------------------------------------------------------------


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


def dynamics_report(
    analyses: Sequence[Analysis], runs: Sequence[Run], wanted: Any, out: Path
) -> list[Json]:
    """Write the paper's figures and how well scores tell signal from noise; returns its rows."""
    name = chosen_sets(runs, wanted)[0] if runs else ""
    of_run = {run.folder: run for run in runs}
    curves = [
        of_run[folder].curves[name]._replace(label=analysis.name)
        for analysis in analyses
        if (folder := analysis.store.folder.parents[1]) in of_run
    ]
    truth: list[Json] = []
    with progress("signal and noise", len(analyses), "runs") as advance:
        for analysis in analyses:
            truth += truth_rows(analysis)
            advance(1)
    paper_figures(analyses, out / "figures", curves, name, truth)
    rule = [row for analysis in analyses for row in kept_rows(analysis)]
    for stem, rows in (("truth", truth), ("truth_kept", rule)):
        if rows:
            write_csv(out / f"{stem}.csv", rows)
    return truth


# ---- all of it ----------------------------------------------------------------------------------


class Report(NamedTuple):
    """What a report left."""

    page: Path  # report.html
    rows: list[Json]  # of the table; none where no run is complete

    @property
    def table(self) -> Path:
        return self.page.with_name("table.md")


@stage(REPORT)
def report(
    runs: Folder | Sequence[Folder],
    out: Folder,
    *,
    baselines: Mapping[str, Folder] | None = None,
    sets: Sequence[str] | None = None,
    max_dynamics: int = 12,
    modules: Sequence[str] = (),
    check: str = "size",
) -> Report:
    """Write one page, tables and figures of runs, with spread over seeds and the controls.

    Args:
        runs: a folder with runs in it or below it, or a list of folders. Runs that differ in their
            seed alone are one arm, and all must have one corpus and one budget.
        out: folder of the page, tables and figures; an earlier report there is replaced.
        baselines: {name: run's folder}: what else could be done; corpus and budget may differ.
        sets: held-out sets; None: all of them.
        max_dynamics: at most so many stores of token losses are shown, one seed of each arm first.
        modules: files or dotted names that hold rules of your own.
        check: "size", or "full" to compare every file's hash first.

    Returns:
        The page and the table's rows.

    Raises:
        UserError: a setting does not fit, or there is nothing to report.
    """
    import_modules(modules)
    folder = Path(out)
    check_own(folder, ["report.html"], MADE_BY)  # the others when they are known
    folders = folders_of(runs)
    finished, left_out = read_runs(folders)
    report_left_out(left_out)
    if finished:
        check_own(folder, ["table.csv", "table.md", "runs.csv", "loss_vs_k.png"], MADE_BY)
    stores = all_stores(folders)
    chosen = chosen_stores(stores, max_dynamics)
    notes = chosen_note(stores, chosen)
    analyses = read_analyses(chosen, check)
    if not finished and not analyses:
        raise UserError(
            f"none of the {len(left_out)} runs in {runs} can be shown, for the reasons above, and "
            "none has token losses (`slm dynamics`)"
        )
    title = title_of(folders, finished)
    with replacing(folder, MADE_BY) as to:
        sweep = sweep_report(finished, left_out, sets, baselines or {}, to) if finished else None
        truth = dynamics_report(analyses, finished, sets, to) if analyses else []
        write_page(to / "report.html", title, analyses, sweep, truth, notes)
    return Report(folder / "report.html", list(sweep.rows) if sweep else [])


def title_of(folders: Sequence[str], runs: Sequence[Run]) -> str:
    """sweep: all, excess, random"""
    names = ", ".join(Path(name).resolve().name for name in folders)
    rules = ", ".join(sorted({run.rule for run in runs}))
    return f"{names}: {rules}" if rules else names


def run(**settings: Any) -> None:
    made = report(**settings)
    if made.rows:
        print(made.table.read_text(), end="")
    log.info("report: %s", made.page)
