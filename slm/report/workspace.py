"""A Weights & Biases workspace of a project or a sweep: `slm dashboard`.

    slm dashboard runs=runs/sweep group=runs-sweep

Sections: loss, selection, token dynamics, speed; tokens seen are the x axis. It is built and
written as JSON without a network, and saved to W&B where there is a login. Where `runs` are given,
panels are for what these runs logged; else for all that a run may log, by patterns where names are
a user's own.
"""

import csv
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm.command_keys import DASHBOARD
from slm.dynamics.classes import CLASSES
from slm.errors import UserError
from slm.stage import Folder, stage
from slm.store.files import read_json, write_json
from slm.train.callbacks.base import TOKENS_SEEN
from slm.train.loggers import resolve_mode

log = logging.getLogger("slm.dashboard")
DEFAULT_PROJECT = "slm"  # conf/logger/wandb.yaml's
LOGS = ("train.csv", "heldout.csv", "dynamics.csv")
COLUMNS, MAX_RUNS = 3, 50  # of a section; of a panel
RULE = ("selection.rule", "selection.select_ratio")  # what runs of a sweep differ in, but seeds
EXCESS = ("dynamics/loss", "slm/excess_mean")  # there are references
SELECTED = ("dynamics/loss_selected",)  # and they are all that the run's rule needs
MISSING = "slm dashboard needs the package wandb-workspaces: pip install 'slm-trainer[dashboard]'"


class Plot(NamedTuple):
    """A line plot over tokens seen."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None  # of metrics whose names are not known here
    split: bool = False  # a plot for each metric, where many runs are compared


class Medium(NamedTuple):
    """What wandb_media.py logs as `key`; it is there where the metrics that it `needs` are."""

    title: str
    key: str
    kind: str  # histogram, chart (lines by class) or media (a page or a table)
    needs: tuple[str, ...] = ("dynamics/loss",)


def of_classes(title: str, name: str) -> Plot:
    return Plot(title, tuple(f"dynamics/{name}/{label}" for label in CLASSES), split=True)


SECTIONS: dict[str, tuple[Plot | Medium, ...]] = {
    "Loss": (
        Plot("loss of all tokens", ("train/loss_all",)),
        Plot("held-out loss", pattern=r"^heldout/(.+)/loss$"),
        Plot("held-out bits per byte", pattern=r"^heldout/(.+)/bits_per_byte$"),
        Plot("selected and unselected", ("train/loss_selected", "train/loss_unselected")),
    ),
    "Selection": (
        Plot("share kept", ("slm/kept_frac",)),
        Plot("threshold", ("slm/threshold",)),
        Plot("mean excess loss", ("slm/excess_mean", "slm/excess_mean_selected")),
        Plot("overlap with the mask before", ("slm/mask_jaccard",)),
        Plot("share kept of a source", pattern=r"^slm/kept_frac/(.+)$"),
        Plot("effective share", ("slm/effective_frac",)),
    ),
    "Token dynamics": (
        of_classes("share", "share"),
        of_classes("loss", "loss"),
        of_classes("share kept", "kept_frac"),
        Plot("loss, by selection", ("dynamics/loss_selected", "dynamics/loss_unselected")),
        Medium("excess loss", "dynamics/excess_loss", "histogram", EXCESS),
        Medium(
            "excess loss of selected",
            "dynamics/excess_loss_selected",
            "histogram",
            EXCESS + SELECTED,
        ),
        Medium("loss by final class", "dynamics/loss_by_class", "chart"),
        Medium("share kept by final class", "dynamics/kept_frac_by_class", "chart", SELECTED),
        Medium("tokens by class", "dynamics/heat_map", "media"),
        Medium("examples", "dynamics/examples", "media"),
        Medium("by class", "dynamics/by_class", "media"),
    ),
    "Speed": (
        Plot("tokens per second", ("perf/tokens_per_s",)),
        Plot("seconds per step", ("perf/step_s",)),
        Plot("model FLOPs utilisation", ("perf/mfu",)),
        Plot("peak memory, bytes", ("perf/peak_memory_bytes",)),
    ),
}


# ---- what the runs logged -----------------------------------------------------------------------


class Logged(NamedTuple):
    """Of the runs in a folder."""

    metrics: list[str]
    projects: dict[str, Path]  # of W&B, with a run of each


def read_logged(folder: str | Path) -> Logged:
    """The columns of the runs' CSV files, and where in W&B the runs are."""
    if not Path(folder).is_dir():
        raise UserError(f"runs is {folder}, which is no folder")
    runs = sorted(path.parent for path in Path(folder).rglob(LOGS[0]))
    if not runs:
        raise UserError(
            f"{folder} has no {LOGS[0]} in it or below it: no run, or without logger.csv"
        )
    files = [run / name for run in runs for name in LOGS if (run / name).exists()]
    names = dict.fromkeys(name for path in files for name in metrics_of(path))
    records = [run for run in runs if (run / "wandb_run.json").exists()]
    return Logged(list(names), {project_of(run): run for run in records})


def metrics_of(path: Path) -> list[str]:
    with open(path, newline="", encoding="utf-8") as file:
        columns = csv.DictReader(file).fieldnames or []
    return [name for name in columns if name not in ("step", "tokens_seen")]


def project_of(run: Path) -> str:
    return read_json(run / "wandb_run.json")["project"]


def chosen_project(given: str | None, logged: Logged | None) -> str:
    if given is not None or logged is None:
        return given or DEFAULT_PROJECT
    if len(logged.projects) != 1:
        found = ", ".join(f"{name} ({run})" for name, run in logged.projects.items())
        what = f"several W&B projects: {found}" if found else "no W&B project (no wandb_run.json)"
        raise UserError(f"the runs name {what}; give project=...")
    return next(iter(logged.projects))


def known_panels(panels: Iterable[Plot | Medium], metrics: Sequence[str]) -> list[Plot | Medium]:
    """Those of what was logged, with the names that patterns stand for."""
    found: list[Plot | Medium] = []
    for panel in panels:
        if isinstance(panel, Medium):
            found += [panel] * (set(panel.needs) <= set(metrics))
        elif panel.pattern is not None:
            matches = [re.search(panel.pattern, name) for name in metrics]
            found += [Plot(f"{panel.title}: {m[1]}", (m[0],)) for m in matches if m is not None]
        elif there := tuple(name for name in panel.metrics if name in metrics):
            found.append(panel._replace(metrics=there))
    return found


def split_panels(panels: Iterable[Plot | Medium]) -> list[Plot | Medium]:
    """A plot for each class, since a line for each class and run would be too many."""
    found: list[Plot | Medium] = []
    for panel in panels:
        if isinstance(panel, Plot) and panel.split:
            names = [(name, name.rsplit("/", 1)[1]) for name in panel.metrics]
            found += [Plot(f"{panel.title}: {label}", (name,)) for name, label in names]
        else:
            found.append(panel)
    return found


def shown_sections(logged: Logged | None, is_sweep: bool) -> dict[str, list[Plot | Medium]]:
    """A section without panels is left out."""
    sections = {}
    for name, panels in SECTIONS.items():
        shown = list(panels) if logged is None else known_panels(panels, logged.metrics)
        if shown:
            sections[name] = split_panels(shown) if is_sweep else shown
    return sections


# ---- the workspace ------------------------------------------------------------------------------


class Library(NamedTuple):
    """The two modules of wandb-workspaces, which are an extra and cost a second."""

    workspaces: Any
    panels: Any


def load_library() -> Library:
    with warnings.catch_warnings():  # wandb-workspaces 0.4.13 asks pydantic 2 in version 1's way
        warnings.filterwarnings("ignore", "Pydantic V1 style `@validator`", DeprecationWarning)
        try:
            import wandb_workspaces.reports.v2 as panels
            import wandb_workspaces.workspaces as workspaces
        except ImportError as error:
            raise UserError(f"{MISSING} ({error})") from None
    return Library(workspaces, panels)


def build(
    project: str | None, entity: str | None, name: str, group: str | None, logged: Logged | None
) -> Any:
    """The Workspace; nothing is sent."""
    library = load_library()
    ws, runset = library.workspaces, make_runset(library, group)
    sections = [
        make_section(library, title, [make_panel(library, panel, group) for panel in panels])
        for title, panels in shown_sections(logged, group is not None).items()
    ]
    try:
        return ws.Workspace(
            entity=entity or "",
            project=chosen_project(project, logged),
            name=name,
            sections=sections,
            settings=ws.WorkspaceSettings(x_axis=TOKENS_SEEN, max_runs=MAX_RUNS),
            runset_settings=runset,
        )
    except ValueError as error:  # pydantic's has several lines
        raise UserError(f"name is {name!r}, W&B refuses it: {last_words(error)}") from None


def last_words(error: ValueError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(line.split(" [type=")[0] for line in lines if " [type=" in line) or lines[0]


def make_section(library: Library, name: str, panels: list[Any]) -> Any:
    ws = library.workspaces
    rows = -(-len(panels) // COLUMNS)
    return ws.Section(
        name=name,
        panels=panels,
        is_open=True,
        layout_settings=ws.SectionLayoutSettings(columns=COLUMNS, rows=rows),
        panel_settings=ws.SectionPanelSettings(x_axis=TOKENS_SEEN),
    )


def make_panel(library: Library, panel: Plot | Medium, group: str | None) -> Any:
    wr = library.panels
    if isinstance(panel, Medium) and panel.kind == "media":
        return wr.MediaBrowser(title=panel.title, num_columns=1, media_keys=[panel.key])
    if isinstance(panel, Medium) and panel.kind == "chart":
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{panel.key}_table"}},
            chart_name="wandb/lineseries/v0",  # what wandb.plot.line_series makes
            chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
            chart_strings={"title": panel.title, "xname": "tokens seen"},
        )
    if isinstance(panel, Medium):  # W&B draws the histograms of a run as a line plot
        return wr.LinePlot(title=panel.title, x=TOKENS_SEEN, y=[panel.key])
    # Of seeds their mean, and a band from the lowest to the highest.
    seeds = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"} if group else {}
    return wr.LinePlot(
        title=panel.title,
        x=TOKENS_SEEN,
        y=list(panel.metrics),
        metric_regex=panel.pattern,
        title_x="tokens seen",
        max_runs_to_show=MAX_RUNS,
        **seeds,
    )


def make_runset(library: Library, group: str | None) -> Any:
    """The runs of a sweep, those that differ in their seed alone together; else every run."""
    ws = library.workspaces
    if group is None:
        return ws.RunsetSettings()
    # The library doubles an `=` and parses quotes inside of values, so each character is escaped.
    value = "".join(f"\\U{ord(character):08x}" for character in group)
    return ws.RunsetSettings(
        filters=f"Metric('Group') == '{value}'",
        groupby=[ws.Config(key) for key in RULE],
    )


# ---- the command --------------------------------------------------------------------------------


def is_to_be_saved(save: str | bool) -> bool:
    """Say why not, where `auto` says no."""
    if save is False:
        return False
    mode, reason = resolve_mode("auto" if save == "auto" else "online")
    if mode != "online" and save is True:
        raise UserError(f"save is true, and W&B is {mode}: {reason} (`wandb login`, WANDB_API_KEY)")
    if mode != "online":
        log.info("not saved to W&B: %s", reason)
    return mode == "online"


def save_workspace(workspace: Any, out: Path) -> None:
    try:
        if not workspace.entity:
            import wandb

            workspace.entity = wandb.Api().default_entity
        workspace.save()  # which prints the address
    except Exception as error:  # of the library, of the network, of the server
        text = " ".join(str(error).split())
        raise UserError(f"{out} is written; W&B took no workspace: {text}") from None


@stage(DASHBOARD)
def dashboard(
    runs: Folder | None = None,
    out: Folder = "dashboard.json",
    *,
    project: str | None = None,
    entity: str | None = None,
    name: str = "Selective language modeling",
    group: str | None = None,
    save: str | bool = "auto",
) -> Any:
    """A W&B workspace with the loss, the selection, token dynamics and the speed.

    Args:
        runs: a run's folder, or one with runs below it: panels for what was logged there.
        out: a file for the workspace as W&B's own specification.
        project: of W&B, by default the one that `runs` were logged to, else slm.
        entity: user or team, by default the login's own.
        name: of the workspace.
        group: a sweep's group in W&B: its runs alone, seeds averaged.
        save: "auto": to W&B where there is a login and a way out; True: or fail; False.

    Returns:
        The Workspace of the package wandb-workspaces.

    Raises:
        UserError: that package is missing, `runs` has no run, W&B refuses; a setting is wrong.
    """
    saving = is_to_be_saved(save)
    logged = None if runs is None else read_logged(str(runs))
    workspace = build(project, entity, name, group, logged)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, workspace._spec)
    if saving:
        save_workspace(workspace, path)
    return workspace


def run(**settings: Any) -> None:
    workspace = dashboard(**settings)
    for section in workspace.sections:
        print(f"{section.name}: {len(section.panels)} panels")
    log.info("workspace: %s", settings["out"])
