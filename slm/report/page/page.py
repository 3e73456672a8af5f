"""One self-contained page about runs: `write_page`, called by `slm report`.

    page.html, page.css, page.js   its template, style and script, beside this file

The file that is written holds Plotly (4.8 MB), the style, the script and the data; it asks no
network for anything and forbids itself to. Text of tokens is data: the script sets it as text, it
is never markup. What is shown of large sets is a sample: up to some twenty runs fit into 8 MB.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from slm.dynamics.analysis import Analysis
from slm.dynamics.class_figures import EXAMPLES, Shown
from slm.dynamics.classes import ARROWS, CLASSES, MEANING, draw_examples
from slm.dynamics.colours import STYLE_SHEET
from slm.dynamics.compared_figures import Compared
from slm.dynamics.figure import Figure
from slm.dynamics.figures import COMPARED, FIGURES, Kind, made
from slm.dynamics.selection_figures import SCORES
from slm.dynamics.token_set import in_context
from slm.evaluate.speech import summaries
from slm.report.page.plots import boxes
from slm.report.page.tokens import (
    Sample,
    draw_dropped,
    draw_sample,
    excess_limit,
    loss_paths,
    shown_targets,
    token_columns,
    window_texts,
)
from slm.report.provenance import Provenance
from slm.report.table import digits, minus_digits, minus_text
from slm.selection.names import selection_name
from slm.store.files import Json, atomic_file

log = logging.getLogger("slm.report.page.page")
HERE = Path(__file__).parent
MAX_WINDOWS = 24
MAX_TOKENS = 12_000  # shown of one run
MAX_ALL_TOKENS = 18_000  # shown of all runs
MAX_BYTES = 8_000_000
MAX_PROMPTS = 12
# Of a JSON text inside of <script>: no tag can end it, and every parser reads the same lines.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
CLASS_RULES = {
    "HH": "no such change, the last loss above the mean",
    "LH": "the line rises by more than the threshold",
    "HL": "the line falls by more than the threshold",
    "LL": "no such change, the last loss at or below the mean",
}


class SweepFigures(NamedTuple):
    """What runs that differ in their selection say together."""

    figures: Mapping[Kind, Figure]  # sweep_figures.SWEEP_FIGURES
    sets: Sequence[str]  # the held-out sets
    rows: Sequence[Json]  # of the table, one an arm and set, see `report.table_rows`
    notes: Sequence[str]  # below the table
    provenance: Provenance
    summary: str  # 12 runs in 6 arms, ...
    mixtures: Sequence[Json] = ()  # of mixtures.mixture_rows


def write_page(
    path: Path,
    title: str,
    analyses: Sequence[Analysis] = (),
    sweep: SweepFigures | None = None,
    truth: Sequence[Json] = (),
    notes: Sequence[str] = (),
    seed: int = 0,
    speech: Sequence[Json] = (),
) -> None:
    """Any part may be absent; `seed` draws the windows and tokens that are shown.

    truth:  rows of truth.truth_rows of all runs
    notes:  on which of the runs are shown
    speech: rows of speech.read_speech
    """
    data = page_data(analyses, sweep, truth, seed)
    content = render(title, analyses, sweep, truth, notes, data, speech).encode()
    if len(content) > MAX_BYTES:
        size = f"{len(content) / 1e6:.1f} MB"
        log.warning("%s has %s, browsers will be slow: show fewer runs", path, size)
    with atomic_file(Path(path)) as file:
        file.write(content)


def templates(folder: Path) -> Environment:
    """Of a page: what is in no variable is an error, and text of others is text."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(
    title: str,
    analyses: Sequence[Analysis],
    sweep: SweepFigures | None,
    truth: Sequence[Json],
    notes: Sequence[str],
    data: Json,
    speech: Sequence[Json],
) -> str:
    from plotly.offline import get_plotlyjs  # half a second, and only pages need it

    environment = templates(HERE)
    environment.filters |= {
        "fixed": fixed,
        "percent": percent,
        "minus": minus_text,
    }
    return environment.get_template("page.html").render(
        title=title,
        runs=[summary(analysis, rows_of(analysis, truth)) for analysis in analyses],
        classes=[(name, ARROWS[name], CLASS_RULES[name], MEANING[name]) for name in CLASSES],
        table=sweep and sweep_table(sweep),
        sections=data["sweep"],
        notes=sweep.notes if sweep else [],
        dynamics_notes=notes,
        arms=indices_by_arm(analyses),
        provenance=sweep and sweep.provenance,
        mixtures=sweep.mixtures if sweep else [],
        summary=sweep.summary if sweep else "",
        speech=speech_of(speech),
        compares_sets=len({set_key(analysis) for analysis in analyses}) > 1,
        compares_fits=len({fit_key(analysis) for analysis in analyses}) > 1,
        colours={name: colour.css for name, colour in STYLE_SHEET.items()},
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        data=Markup(as_json(data)),
    )


def as_json(value: Any) -> str:
    """For a script element: ASCII, and nothing in it reads as markup."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(ESCAPES)


# ---- the data -----------------------------------------------------------------------------------


def rows_of(analysis: Analysis, truth: Sequence[Json]) -> list[Json]:
    return [row for row in truth if row["run"] == analysis.name]


def page_data(
    analyses: Sequence[Analysis], sweep: SweepFigures | None, truth: Sequence[Json], seed: int
) -> Json:
    most = min(MAX_TOKENS, MAX_ALL_TOKENS // max(1, len(analyses)))
    samples: dict[str, Sample] = {}
    for analysis in analyses:
        if set_key(analysis) not in samples:
            samples[set_key(analysis)] = draw_sample(analysis.tokens, MAX_WINDOWS, most, seed)
    return {
        "classes": [{"key": name, "name": ARROWS[name], "word": MEANING[name]} for name in CLASSES],
        "windows": set_windows(analyses, samples),
        "runs": [
            run_data(analysis, samples[set_key(analysis)], rows_of(analysis, truth), seed)
            for analysis in analyses
        ],
        "compared": sections(made(COMPARED, Compared(analyses, truth)))
        if len(analyses) > 1
        else {},
        "sweep": sections(sweep.figures) if sweep else {},
    }


def set_key(analysis: Analysis) -> str:
    """Runs on the same tokens share their text."""
    plan = analysis.store.plan
    return f"{plan['corpus_fingerprint']} {plan['windows_sha256']}"


def fit_key(analysis: Analysis) -> str:
    """Classes that can be compared are of the same checkpoints, threshold and level."""
    settings = analysis.store.settings
    level = settings["mean_loss"] if settings else None
    return f"{analysis.tokens_seen.tolist()} {analysis.threshold} {level}"


def set_windows(analyses: Sequence[Analysis], samples: dict[str, Sample]) -> Json:
    return {
        set_key(analysis): window_texts(analysis.tokens, samples[set_key(analysis)])
        for analysis in analyses
    }


def run_data(analysis: Analysis, sample: Sample, truth: Sequence[Json], seed: int) -> Json:
    shown = shown_targets(analysis.tokens, sample)
    dropped = draw_dropped(analysis, seed)
    examples = draw_examples(analysis.trajectories.label, EXAMPLES, seed)
    chosen = np.concatenate([*examples, *(one.chosen for one in dropped)])
    kinds = [kind for kind in FIGURES if kind.section]
    return {
        "name": analysis.name,
        "set": set_key(analysis),
        "sources": list(analysis.store.sources),
        "tokens_seen": analysis.tokens_seen.tolist(),
        "excess_limit": excess_limit(analysis),
        "mean_loss": round(analysis.mean_loss, 3),
        "columns": token_columns(analysis, shown),
        "paths": loss_paths(analysis.losses, shown),
        "figures": sections(made(kinds, Shown(analysis, truth=truth, seed=seed))),
        "examples": [in_context(analysis.tokens, int(target))._asdict() for target in chosen],
        "example_columns": token_columns(analysis, chosen),
        "dropped": [
            {"source": one.source, "kept": percent(one.kept), "count": len(one.chosen)}
            for one in dropped
        ],
    }


def sections(figures: Mapping[Kind, Figure]) -> dict[str, list[Json]]:
    """What stands in each section of the page, in the order of the list."""
    found: dict[str, list[Json]] = {}
    for kind, figure in figures.items():
        if kind.section:
            found.setdefault(kind.section, []).extend(boxes(kind.name, figure))
    return found


# ---- what the template writes -------------------------------------------------------------------


def summary(analysis: Analysis, truth: Sequence[Json]) -> Json:
    """One run's facts and the table of its classes."""
    return {
        "name": analysis.name,
        "rule": selection_name(analysis.store.plan["run"]["selection"]),
        "checkpoints": len(analysis.tokens_seen),
        "first": int(analysis.tokens_seen[0]),
        "last": int(analysis.tokens_seen[-1]),
        "num_tokens": analysis.tokens.num_targets,
        "num_windows": len(analysis.tokens.windows),
        "threshold": analysis.threshold,
        "mean_loss": analysis.mean_loss,
        "uneven": analysis.uneven,
        "classes": [class_row(analysis, index) for index in range(len(CLASSES))],
        "truth": truth_table(truth),
        "truth_ratios": truth_ratios(truth),
    }


def indices_by_arm(analyses: Sequence[Analysis]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, analysis in enumerate(analyses):
        found.setdefault(analysis.arm, []).append(index)
    return found


def class_row(analysis: Analysis, index: int) -> Json:
    found = analysis.shares[CLASSES[index]]
    return {
        "key": CLASSES[index],
        "name": ARROWS[CLASSES[index]],
        "share": found,
        "first": analysis.class_losses[0, index],
        "last": analysis.class_losses[-1, index],
        "kept": None if analysis.kept is None else analysis.kept.by_class[-1, index],
    }


def sweep_table(sweep: SweepFigures) -> Json:
    """A line an arm; of each set the mean with its range, the lowest mean marked."""
    cells = {(row["arm"], row["set"]): row for row in sweep.rows}
    arms = list(dict.fromkeys(row["arm"] for row in sweep.rows))
    best = {name: min(cells[arm, name]["mean"] for arm in arms) for name in sweep.sets}
    lines = [[cells[arm, name] for name in sweep.sets] for arm in arms]
    places = {"digits": digits(sweep.rows), "minus_digits": minus_digits(sweep.rows)}
    return {"sets": sweep.sets, "lines": lines, "best": best} | places


def speech_of(rows: Sequence[Json]) -> Json | None:
    """A line a model; of the texts the first prompts', each with the models' first texts of it."""
    if not rows:
        return None
    by_prompt: dict[str, dict[str, Json]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], {}).setdefault(row["model"], row)
    found: Json = {"models": summaries(rows), "compared": "copied_tokens" in rows[0]}
    return found | {"prompts": list(by_prompt.items())[:MAX_PROMPTS], "all": len(by_prompt)}


def truth_table(rows: Sequence[Json]) -> list[Json]:
    """At the last checkpoint: a row a part and score."""
    last = max((row["tokens_seen"] for row in rows), default=0)
    return [
        row | {"label": SCORES[row["score"]], "precision": precision(row)}
        for row in rows
        if row["tokens_seen"] == last
    ]


def precision(row: Json) -> list[float]:
    """At each ratio, ascending."""
    return [value for name, value in row.items() if name.startswith("precision_at_")]


def truth_ratios(rows: Sequence[Json]) -> list[str]:
    first = rows[0] if rows else {}
    return [name.removeprefix("precision_at_") for name in first if name.startswith("precision_")]


def fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.{digits}f}%"
