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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm.command_keys import REPORT
from slm.console import progress
from slm.dynamics.analysis import Analysis
from slm.dynamics.figure import Figure
from slm.dynamics.figures import Kind, made
from slm.dynamics.truth import kept_rows, truth_rows
from slm.errors import UserError
from slm.evaluate.speech import read_speech
from slm.names import file_name
from slm.report.analyses import all_stores, chosen_note, chosen_stores, many, read_analyses
from slm.report.arms import (
    Arm,
    Run,
    arms_of,
    check_heldout,
    check_runs,
    read_runs,
    report_left_out,
)
from slm.report.baselines import before_training, begun_with, check_names, read_baselines
from slm.report.mixtures import mixture_rows
from slm.report.page.page import SweepFigures, write_page
from slm.report.paper.figures import paper_figures
from slm.report.paper.plots import draw
from slm.report.provenance import provenance, run_rows
from slm.report.sweep_figures import SWEEP_FIGURES, Sweep
from slm.report.table import MINUS_NOTE, REACH_NOTE, control_runs, markdown, table_rows
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.files import Json, atomic_file, write_csv
from slm.store.own_files import check_own, replacing
from slm.train.curves import folders_of
from slm.train.lineage import short_name

log = logging.getLogger("slm.report")
MADE_BY = "slm report"
MAX_PANELS = 8  # in one picture
MOST_BYTES = 150  # of a set's name in a file's


# ---- the figures --------------------------------------------------------------------------------


def draw_sweep(figures: Mapping[Kind, Figure], out: Path) -> None:
    """One picture a figure, or one a group of its panels where they are too many for one."""
    for kind, figure in figures.items():
        if not kind.paper:
            continue
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


def sweep_report(
    runs: Sequence[Run],
    left_out: dict[Path, str],
    wanted: Any,
    named: Mapping[str, Folder],
    heldout: Mapping[str, Folder],
    out: Path,
) -> SweepFigures:
    """Write the tables and figures of finished runs."""
    check_runs(runs)
    sets, arms = chosen_sets(runs, wanted), arms_of(runs)
    controls = control_runs(arms)
    if not controls:
        log.warning("no run trains on all tokens (selection=all or select_ratio=1): no control")
    before = before_training(runs, sets)
    baselines = read_baselines(named, runs, sets, heldout)
    check_names([*before, *arms], baselines)
    check_heldout([run for arm in (*arms, *baselines) for run in arm.runs], sets)
    rows = table_rows([*before, *arms, *baselines], sets, controls)
    write_csv(out / "table.csv", rows)
    with atomic_file(out / "table.md") as file:
        file.write(markdown(rows, sets, left_out).encode())
    figures = made(SWEEP_FIGURES, Sweep(arms, [*before, *baselines], controls, sets))
    draw_sweep(figures, out)
    notes = [MINUS_NOTE, REACH_NOTE] if controls else []
    models = [arm for arm in baselines if not arm.has_run]
    notes += [
        f"{arm.label}: the model {short_name(arm.runs[0].folder)}, evaluated by this report"
        + (", which the runs began with" if before and begun_with(arm, runs[0]) else "")
        for arm in models
    ]
    notes += [f"Left out: {folder}: {reason}" for folder, reason in left_out.items()]
    found = provenance([arm for arm in (*arms, *baselines) if arm.has_run])
    write_csv(out / "runs.csv", run_rows([*arms, *baselines]))
    mixtures = mixture_rows(arms)
    if mixtures:
        write_csv(out / "mixture.csv", mixtures)
    return SweepFigures(figures, sets, rows, notes, found, counted(arms, baselines), mixtures)


def counted(arms: Sequence[Arm], baselines: Sequence[Arm]) -> str:
    """12 runs in 4 arms, 3 seeds each; 1 baseline"""
    seeds = sorted({len(arm.runs) for arm in arms})
    runs = sum(len(arm.runs) for arm in arms)
    each = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    each += " seed each" if seeds == [1] else " seeds each"
    more = f"; {many(len(baselines), 'baseline')}" if baselines else ""
    return f"{many(runs, 'run')} in {many(len(arms), 'arm')}, {each}{more}"


# ---- token dynamics -----------------------------------------------------------------------------


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
    heldout: Mapping[str, Folder] | None = None,
    sets: Sequence[str] | None = None,
    speech: Folder | None = None,
    max_dynamics: int = 12,
    modules: Sequence[str] = (),
    check: str = "size",
) -> Report:
    """Write one page, tables and figures of runs, with spread over seeds and the controls.

    Args:
        runs: a folder with runs in it or below it, or a list of folders. Runs that differ in their
            seed alone are one arm, and all must have one corpus and one budget.
        out: folder of the page, tables and figures; an earlier report there is replaced.
        baselines: {name: folder}: what else could be done. A run, whose corpus and budget may
            differ; or a model, a folder or a name on the hub, which is evaluated here.
        heldout: {set: corpus folder}: of the held-out sets, for baselines that are models, or runs
            that read other windows of them.
        sets: held-out sets; None: all of them.
        speech: the file of `slm speak`, whose texts the page shows.
        max_dynamics: at most so many stores of token losses are shown, one seed of each arm first.
        modules: files or dotted names that hold rules of your own.
        check: "size", or "full" to compare every file's hash first.

    Returns:
        The page and the table's rows.

    Raises:
        UserError: a setting does not fit, or there is nothing to report.
    """
    import_modules(modules)
    said = read_speech(Path(speech)) if speech is not None else []
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
        named, corpora = baselines or {}, heldout or {}
        sweep = sweep_report(finished, left_out, sets, named, corpora, to) if finished else None
        truth = dynamics_report(analyses, finished, sets, to) if analyses else []
        write_page(to / "report.html", title, analyses, sweep, truth, notes, speech=said)
    return Report(folder / "report.html", list(sweep.rows) if sweep else [])


def title_of(folders: Sequence[str], runs: Sequence[Run]) -> str:
    """sweep: all, excess, random"""
    named = [Path(name).resolve().name for name in folders]
    rules = sorted({run.rule for run in runs} - {*named})
    return ", ".join(named) + (f": {', '.join(rules)}" if rules else "")


def run(**settings: Any) -> None:
    made = report(**settings)
    if made.rows:
        print(made.table.read_text(), end="")
    log.info("report: %s", made.page)
