"""The paper figures of every run, after those of Rho-1, from the stored losses alone.

    text-selected, text-classes  figure 2   a piece of text, what is selected or classes coloured
    classes                      figure 3   the mean loss of each class, tokens that go up and down
    selection                    figure 6   loss of what a rule selects and does not
    perplexity                   figure 8   perplexity of the sets selected at several checkpoints

and all others that slm/dynamics/figures.py says are for paper. Each is a PNG, an SVG and, so that
others can draw it anew, the numbers it draws as CSV. The same losses give the same bytes.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from slm.dynamics.analysis import Analysis
from slm.dynamics.class_figures import Shown
from slm.dynamics.compared_figures import Compared
from slm.dynamics.figure import Row
from slm.dynamics.figures import COMPARED, FIGURES, made
from slm.errors import UserError
from slm.report.paper.plots import draw
from slm.report.paper.text import text_figure
from slm.train.curves import Curve

log = logging.getLogger(__name__)
MOST_CHARACTERS = 150  # of a run's name in a file's


def paper_figures(
    analyses: Sequence[Analysis],
    out: Path,
    heldout: Sequence[Curve] = (),  # labelled with the names of the runs
    heldout_name: str = "held-out text",
    truth: Sequence[Row] = (),  # of all runs
    seed: int = 0,
) -> list[Path]:
    """Write the figures that can be drawn of the runs; the log says why others cannot.

    Returns the PNGs; SVG and CSV stand beside them under the same name.
    """
    written = []
    for analysis, stem in zip(analyses, file_names(analyses), strict=True):
        mine = [row for row in truth if row["run"] == analysis.name]
        shown = Shown(analysis, analyses, heldout, heldout_name, mine, seed)
        kinds = [kind for kind in FIGURES if kind.paper]
        for kind, figure in made(kinds, shown, logging.INFO).items():
            written.append(out / f"{kind.name}-{stem}.png")
            draw(figure, written[-1])
        written += text_figures(analysis, out, stem, seed)
    several = [kind for kind in COMPARED if kind.paper] if len(analyses) > 1 else []
    for kind, figure in made(several, Compared(analyses, truth), logging.INFO).items():
        written.append(out / f"{kind.name}.png")
        draw(figure, written[-1])
    return written


def text_figures(analysis: Analysis, out: Path, stem: str, seed: int) -> list[Path]:
    written = []
    for by, kind in (("class", "text-classes"), ("selection", "text-selected")):
        try:
            text_figure(analysis, out / f"{kind}-{stem}.png", by=by, seed=seed)
            written.append(out / f"{kind}-{stem}.png")
        except UserError as error:
            log.info("%s is not drawn: %s", kind, error)
    return written


def file_names(analyses: Sequence[Analysis]) -> list[str]:
    """The runs' names with what is safe in a file's, cut, each once."""
    found: list[str] = []
    for analysis in analyses:
        name = analysis.name.replace(" = ", "=")
        stem = re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("._")[:MOST_CHARACTERS] or "run"
        taken = sum(name == stem or name.startswith(f"{stem}~") for name in found)
        found.append(f"{stem}~{taken + 1}" if taken else stem)
    return found
