"""Figures from stored tables, and one page of text with its selected tokens marked.

Nothing here looks at a live run: the input is heldout.csv of each run, or arrays of token ids.
"""

import csv
import html
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Okabe and Ito's palette: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Curve(NamedTuple):
    """One run's held-out loss over training."""

    label: str
    tokens_seen: np.ndarray  # (n,)
    loss: np.ndarray  # (n,), nats


def read_curve(run: Path, label: str, name: str) -> Curve:
    """The loss on the held-out set `name` from the run's heldout.csv."""
    with open(run / "heldout.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[f"heldout/{name}/loss"]]
    seen = np.array([float(row["tokens_seen"]) for row in rows])
    return Curve(label, seen, np.array([float(row[f"heldout/{name}/loss"]) for row in rows]))


def final_losses(run: Path) -> dict[str, float]:
    """The last loss on every held-out set; nothing where the run wrote no heldout.csv."""
    path = run / "heldout.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        columns = csv.DictReader(file).fieldnames or []
    names = [column.split("/")[1] for column in columns if column.endswith("/loss")]
    return {name: float(read_curve(run, "", name).loss[-1]) for name in names}


def loss_figure(
    curves: Sequence[Curve], lines: dict[str, float], title: str, path: Path, start: float = 0.0
) -> None:
    """Loss against tokens: one colour a label, a thin line a run, a thick one their mean.

    lines:  horizontal lines, e.g. the reference model's own loss
    start:  leave out what lies before so many tokens (the first points dwarf the rest)
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    groups: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[curve.label].append(curve)
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for (label, runs), colour in zip(groups.items(), COLOURS, strict=False):
        keep = runs[0].tokens_seen >= start
        seen = runs[0].tokens_seen[keep] / 1e6
        for run in runs:
            axes.plot(seen, run.loss[keep], color=colour, linewidth=0.7, alpha=0.45)
        mean = np.mean([run.loss for run in runs], axis=0)[keep]
        axes.plot(seen, mean, color=colour, linewidth=2, label=f"{label} ({mean[-1]:.3f})")
    for (label, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="#555555", linestyle=style, label=f"{label} ({value:.3f})")
    axes.set(xlabel="training tokens seen (millions)", ylabel="held-out loss (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark;
  --mark: #ffb347; --ink: #1a1a1a; --paper: #ffffff; --quiet: #666; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --mark: #8a4b00; --ink: #e8e8e8; --paper: #161616; --quiet: #9a9a9a; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.65 ui-monospace, monospace;
  border-left: 3px solid var(--mark); padding-left: 1rem; }}
pre span.s {{ background: var(--mark); border-radius: 2px; }}
p, .q {{ color: var(--quiet); }}
</style></head><body>
<h1>{title}</h1>
<p>{lead}</p>
{body}
</body></html>
"""


class MarkedWindow(NamedTuple):
    """One window of text with what was selected in it."""

    name: str
    pieces: Sequence[str]  # (T,) the text of each target
    selected: np.ndarray  # (T,) bool
    token_loss: np.ndarray  # (T,) nats
    reference_loss: np.ndarray  # (T,) nats


def marked_window(window: MarkedWindow) -> str:
    """HTML of one window: selected tokens on a coloured ground, numbers as tooltips."""
    spans = []
    columns = (window.pieces, window.selected, window.token_loss, window.reference_loss)
    for piece, selected, loss, reference in zip(*columns, strict=True):
        numbers = f"loss {loss:.2f}, reference {reference:.2f}, excess {loss - reference:+.2f}"
        mark = ' class="s"' if selected else ""
        spans.append(f'<span{mark} title="{numbers}">{html.escape(piece)}</span>')
    share = f"{100 * np.mean(window.selected):.0f}% selected"
    return (
        f'<h2>{html.escape(window.name)} <span class="q">{share}</span></h2>\n'
        f"<pre>{''.join(spans)}</pre>"
    )


def marked_page(windows: Sequence[MarkedWindow], title: str, lead: str, path: Path) -> None:
    """One self-contained HTML page."""
    body = "\n".join(marked_window(window) for window in windows)
    page = PAGE.format(title=html.escape(title), lead=html.escape(lead), body=body)
    path.write_text(page, encoding="utf-8")


def token_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Text of each token such that their concatenation is the whole text.

    A character whose bytes are split over tokens is shown at the token that completes it. Decodes
    every prefix: quadratic, for windows and not for corpora.
    """
    pieces, shown = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        complete = len(text if end == len(ids) else text.rstrip("\ufffd"))
        pieces.append(text[shown:complete])
        shown = max(shown, complete)
    return pieces
