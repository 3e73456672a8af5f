"""A piece of text, its tokens coloured by what a rule selects or by their class: Rho-1, figure 2.

Of a stored token set alone, as slm/report/paper/figures.py, which writes it with the other figures.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.analysis import Analysis
from slm.dynamics.classes import ARROWS, CLASSES
from slm.dynamics.colours import CLASS_COLOURS, YELLOW, tint
from slm.dynamics.figure import Row, amounts
from slm.dynamics.selection_figures import picker_of
from slm.errors import UserError
from slm.report.paper.excerpts import GREY, columns_in, draw_segments, size_of, wrap
from slm.report.paper.plots import (
    LEGEND_SIZE,
    TITLE_SIZE,
    dress,
    legend_columns,
    pyplot,
    save_figure,
)
from slm.score.token_texts import whole_characters
from slm.store.files import write_csv

SELECTED_COLOUR = YELLOW
BY = ("selection", "class")
WIDTH = 6.8  # inches: the text of a page


class Excerpt(NamedTuple):
    """Tokens [start, stop) of a window; `window` counts those of the token set."""

    window: int
    start: int
    stop: int


def choose_excerpt(analysis: Analysis, seed: int, most: int = 160) -> Excerpt:
    """A window, or `most` tokens in a row of one."""
    rng, (windows, length) = np.random.default_rng(seed), analysis.tokens.tokens.shape
    window, size = int(rng.integers(windows)), min(most, length)
    start = int(rng.integers(length - size + 1))
    return Excerpt(window, start, start + size)


def text_figure(
    analysis: Analysis,
    path: Path,
    excerpt: Excerpt | None = None,  # None: by seed
    by: str = "selection",
    seed: int = 0,
) -> None:
    """Each token coloured by what the rule says of it at the last checkpoint, or by its class.

    What is no target (a window's first token, a prompt) is grey.
    """
    if by not in BY:
        raise UserError(f"text_figure: by is {by!r}, it must be one of {BY}")
    rows = excerpt_rows(analysis, excerpt or choose_excerpt(analysis, seed))
    look = class_look(analysis, rows) if by == "class" else selected_look(analysis, rows)
    found = wrap([row["text"] for row in rows], columns_in(WIDTH))
    figure, axes = pyplot().subplots()
    inks = ["#000000" if row["class"] else GREY for row in rows]
    draw_segments(axes, found, look.grounds, inks, columns_in(WIDTH))
    dress(axes, look.title, WIDTH)
    place_text(figure, axes, size_of(found, columns_in(WIDTH)), look.labels)
    write_csv(path.with_suffix(".csv"), rows)
    save_figure(figure, path)
    pyplot().close(figure)


def excerpt_rows(analysis: Analysis, part: Excerpt) -> list[Row]:
    """A row a token; cells are empty where it is no target."""
    tokens = analysis.tokens
    check_excerpt(part, *tokens.tokens.shape)
    pieces = [tokens.pieces[int(token)] for token in tokens.tokens[part.window]]
    texts, columns = whole_characters(pieces), target_columns(analysis)
    numbers = tokens.spread(np.arange(tokens.num_targets), -1)[part.window]
    numbers = np.concatenate([[-1], numbers])  # the first token is a target of no window
    return [
        {
            "window": int(tokens.windows[part.window]),
            "position": place,
            "token": int(tokens.tokens[part.window, place]),
            "bytes": pieces[place].hex(),
            "text": texts[place],
        }
        | {k: v[numbers[place]].item() if numbers[place] >= 0 else "" for k, v in columns.items()}
        for place in range(part.start, part.stop)
    ]


def check_excerpt(part: Excerpt, windows: int, length: int) -> None:
    if not (0 <= part.window < windows and 0 <= part.start < part.stop <= length):
        raise UserError(f"{part} lies outside of {windows} windows of {length} tokens")


def target_columns(analysis: Analysis) -> dict[str, np.ndarray]:  # (M,) each
    """What is known of every target at the last checkpoint."""
    found = {
        "class": np.array(CLASSES)[analysis.trajectories.label],
        "loss_nats": analysis.losses[-1],
    }
    if "reference_loss" in analysis.tokens.columns:
        found["reference_loss_nats"] = analysis.tokens.columns["reference_loss"]
    if analysis.chooser is not None:
        chosen = analysis.chooser.selected(analysis.losses[-1], int(analysis.tokens_seen[-1]))
        found["selected"] = chosen.astype(np.uint8)
    return found


class TextLook(NamedTuple):
    title: str
    grounds: list[Any]  # a colour for each token, None: white
    labels: dict[str, Any]  # the legend's, with their colours


def selected_look(analysis: Analysis, rows: Sequence[Row]) -> TextLook:
    label = f"selected by {picker_of(analysis).name}"
    colour = tint(SELECTED_COLOUR, 0.75)
    grounds = [colour if row["selected"] == 1 else None for row in rows]
    title = f"{analysis.name}, after {amounts([analysis.tokens_seen[-1]])[0]} training tokens"
    return TextLook(title, grounds, {label: colour})


def class_look(analysis: Analysis, rows: Sequence[Row]) -> TextLook:
    grounds = [tint(CLASS_COLOURS[row["class"]]) if row["class"] else None for row in rows]
    labels = {ARROWS[name]: tint(colour) for name, colour in CLASS_COLOURS.items()}
    title = f"{analysis.name}, {len(analysis.losses)} checkpoints"
    return TextLook(title, grounds, labels)


def place_text(figure: Any, axes: Any, size: tuple[float, float], labels: dict[str, Any]) -> None:
    """A figure as large as the text (inches), its title and its legend; a letter fits its cell."""
    from matplotlib.patches import Patch

    ncols = legend_columns(list(labels), WIDTH, len(labels))
    above = (1.2 * axes.get_title("left").count("\n") + 2) * TITLE_SIZE / 72
    below = (math.ceil(len(labels) / ncols) + 1) * 1.5 * LEGEND_SIZE / 72
    width, height = size[0] + 0.2, size[1] + above + below
    figure.set_size_inches(width, height)
    axes.set_position((0.1 / width, below / height, size[0] / width, size[1] / height))
    handles = [Patch(facecolor=colour, label=label) for label, colour in labels.items()]
    figure.legend(
        handles=handles, loc="lower left", ncols=ncols, frameon=False, fontsize=LEGEND_SIZE
    )
