"""What is logged of token dynamics, against values counted by hand on a store of twelve tokens."""

import html
import json
import re
from typing import Any

import numpy as np
import pytest

from slm.dynamics.analysis import Analysis, analyse
from slm.dynamics.classes import CLASSES
from slm.dynamics.token_set import TokenSet
from slm.dynamics.trajectories import TrajectoryStore
from slm.dynamics.wandb_media import (
    GROUNDS,
    by_class,
    dynamics_metrics,
    examples,
    excess_histograms,
    final_media,
    final_summary,
    heat_map,
)
from slm.report.workspace import SECTIONS, Medium, Plot
from slm.train.loggers import WandbLog
from wandb_helpers import media_file, wandb_history, wandb_summary

EXCESS = {"_target_": "slm.selection.Excess", "select_ratio": 0.5, "scope": "batch"}
# One more token than targets a window: 0 " the", 1 "<b>", 2 and 3 the halves of an umlaut, 4 "\n".
PIECES = {0: b" the", 1: b"<b>", 2: b"\xc3", 3: b"\xa4", 4: b"\n"}
IDS = np.array([[0, 1, 2, 3, 4, 0, 1], [1, 2, 3, 0, 1, 4, 4]])
# Of each token after 0, 100, 200 training tokens; with a mean of 2 at the end.
KINDS = {"HH": [5.0, 5.0, 5.0], "LH": [1.0, 2.0, 3.0], "HL": [4.0, 2.0, 0.0], "LL": [0.0, 0.0, 0.0]}
ORDER = ["HH", "LH", "HL", "LL", "HH", "LH", "HL", "LL", "HH", "LH", "HL", "LL"]
LOSSES = np.array([KINDS[name] for name in ORDER]).T.astype(np.float32)  # (3, 12)


def make_analysis(folder: Any, references: bool = True, losses: np.ndarray = LOSSES) -> Analysis:
    live = np.ones((2, 6), bool)
    columns: dict[str, np.ndarray] = {"source": np.array([0] * 6 + [1] * 6, np.uint16)}
    if references:
        columns["reference_loss"] = np.full(12, 1.5, np.float32)
    tokens = TokenSet(np.array([3, 8]), IDS.astype(np.uint32), live, columns, PIECES)
    run = {"seed": 0, "selection": EXCESS, "selection_start": 0, "micro_batch_size": 2}
    plan = {"kind": "dynamics", "sources": ["web", "math"], "run": run}
    store = TrajectoryStore.create(folder, plan, tokens)
    for index, column in enumerate(losses):
        store.append(100 * index, column)
    return analyse(store, "run")


@pytest.fixture
def analysis(tmp_path) -> Analysis:
    return make_analysis(tmp_path / "dynamics")


# ---- one checkpoint -----------------------------------------------------------------------------


def test_metrics_of_a_checkpoint_are_counted_by_hand():
    losses = np.array([1, 2, 3, 4, 5, 6], np.float32)
    label = np.array([0, 0, 2, 2, 2, 3], np.uint8)
    selected = np.array([1, 0, 1, 1, 0, 0], bool)
    assert dynamics_metrics(losses, label, selected) == pytest.approx(
        {
            "dynamics/loss": 3.5,
            "dynamics/loss_selected": 8 / 3,
            "dynamics/loss_unselected": 13 / 3,
            "dynamics/share/HH": 2 / 6,
            "dynamics/share/LH": 0.0,
            "dynamics/share/HL": 3 / 6,
            "dynamics/share/LL": 1 / 6,
            "dynamics/loss/HH": 1.5,
            "dynamics/loss/HL": 4.0,
            "dynamics/loss/LL": 6.0,
            "dynamics/kept_frac/HH": 0.5,
            "dynamics/kept_frac/HL": 2 / 3,
            "dynamics/kept_frac/LL": 0.0,
        }
    )


def test_what_does_not_exist_is_absent():
    losses = np.array([1.0, 3.0], np.float32)
    assert dynamics_metrics(losses, None, None) == {"dynamics/loss": 2.0}
    everything = dynamics_metrics(losses, None, np.ones(2, bool))
    assert everything == {"dynamics/loss": 2.0, "dynamics/loss_selected": 2.0}
    labelled = dynamics_metrics(losses, np.array([3, 3], np.uint8), None)
    assert not [name for name in labelled if "kept" in name or "selected" in name]


def test_excess_is_counted_in_quarters_and_its_tails_in_the_ends():
    excess = np.array([-30.0, -8.0, -0.01, 0.0, 0.24, 0.25, 7.99, 8.0, 99.0])
    selected = excess > 0.1
    found: Any = excess_histograms(excess, selected)
    counts, edges = found["dynamics/excess_loss"]
    assert len(counts) == 64 and (edges[0], edges[32], edges[-1]) == (-8.0, 0.0, 8.0)
    assert {float(edges[i]): int(counts[i]) for i in np.flatnonzero(counts)} == {
        -8.0: 2,
        -0.25: 1,
        0.0: 2,
        0.25: 1,
        7.75: 3,
    }
    assert found["dynamics/excess_loss_selected"].counts.sum() == 5
    assert list(excess_histograms(excess, None)) == ["dynamics/excess_loss"]


# ---- the whole run ------------------------------------------------------------------------------


def test_the_table_by_class_has_every_checkpoint(analysis):
    table = by_class(analysis)
    assert table.columns == ["tokens_seen", "class", "share_so_far", "loss", "kept_frac"]
    assert [row[:2] for row in table.rows[:5]] == [[0, name] for name in CLASSES] + [[100, "HH"]]
    found = {(row[0], row[1]): row[2:] for row in table.rows}
    assert found[0, "HH"] == [None, 5.0, 1.0]  # no class can be told from one checkpoint
    # Of 12 tokens 6 are selected: three of HH, and then the highest losses, ties to the first.
    assert found[0, "HL"] == [None, 4.0, 1.0] and found[0, "LL"] == [None, 0.0, 0.0]
    assert found[200, "LH"] == [0.25, 3.0, 1.0] and found[200, "HL"] == [0.25, 0.0, 0.0]


def test_curves_leave_out_what_no_token_has(tmp_path):
    losses = np.array([KINDS["HH"], KINDS["LL"]] * 6).T.astype(np.float32)
    found = make_analysis(tmp_path / "d", losses=losses)
    lines: Any = final_media(found)["dynamics/loss_by_class"]
    assert lines.title == "loss by final class"
    assert lines.curves.pop("all tokens") == ([0, 100, 200], [2.5] * 3)
    assert lines.curves == {
        "HH not learned": ([0, 100, 200], [5.0, 5.0, 5.0]),
        "LL easy from the start": ([0, 100, 200], [0.0, 0.0, 0.0]),
    }
    assert {row[0] for row in examples(found).rows} == {"HH", "LL"}


def test_examples_show_the_token_its_context_and_its_losses(analysis):
    table = examples(analysis)
    assert len(table.rows) == 12 and [row[0] for row in table.rows[::3]] == list(CLASSES)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    # The tokens of L->H are the targets 1, 5 and 9.
    assert rows[3] == {
        "class": "LH",
        "token": "\u27e8c3\u27e9",  # the first half of a character
        "before": " the<b>",
        "after": "\u00e4\n the<b>",
        "source": "web",
        "loss_first": 1.0,
        "loss_last": 3.0,
        "delta": pytest.approx(2.0),
        "reference_loss": 1.5,
        "excess_loss": 1.5,
        "times_selected": 2,
    }
    assert rows[4]["token"] == "<b>" and rows[4]["before"] == " the<b>\u00e4\n the"
    assert rows[5]["source"] == "math" and rows[5]["before"] == "<b>\u00e4 the"


def test_examples_are_drawn_by_seed(analysis):
    first, again = examples(analysis, per_class=2), examples(analysis, per_class=2)
    assert first == again and len(first.rows) == 8
    assert any(examples(analysis, per_class=2, seed=seed) != first for seed in range(1, 9))


def test_without_references_their_columns_are_absent(tmp_path):
    found = make_analysis(tmp_path / "d", references=False)
    assert not {"reference_loss", "excess_loss", "times_selected"} & set(examples(found).columns)
    assert by_class(found).columns == ["tokens_seen", "class", "share_so_far", "loss"]
    assert "reference" not in heat_map(found).html and "selected" not in heat_map(found).html
    assert "dynamics/kept_frac_by_class" not in final_media(found)


def test_the_heat_map_colours_escaped_text_by_class(analysis):
    page = heat_map(analysis).html
    found = re.findall(r'<span style="background:(#\w+)" title="([^"]*)">([^<]*)</span>', page)
    colors = {color: name for name, color in GROUNDS.items()}
    assert [colors[color] for color, _, _ in found] == ORDER
    assert [html.unescape(piece) for _, _, piece in found] == [
        *("<b>", "", "\u00e4", "\u21b5\n", " the", "<b>"),
        *("", "\u00e4", " the", "<b>", "\u21b5\n", "\u21b5\n"),
    ]
    assert "<p> the<span" in page and "<p>&lt;b&gt;<span" in page  # no targets, no colours
    said = "L\u2192H forgotten, 1.00 \u2192 3.00 nats, reference 1.50, selected 2 of 3"
    assert found[1][1] == said
    assert "<b>" not in page and "L\u2192H forgotten 25.0%" in page
    assert heat_map(analysis, num_windows=1, num_tokens=4).html.count("<span") == 4


def test_the_dashboard_shows_what_is_logged(analysis):
    shown = [panel for panels in SECTIONS.values() for panel in panels]
    media = {panel.key for panel in shown if isinstance(panel, Medium)}
    selected = np.arange(12) < 6
    excess = excess_histograms(analysis.excess_loss(-1), selected)
    assert media == {*excess, *final_media(analysis)}
    plots = {name for panel in shown if isinstance(panel, Plot) for name in panel.metrics}
    label = analysis.trajectories.label
    logged = set(dynamics_metrics(analysis.losses[-1], label, selected))
    assert {name for name in plots if name.startswith("dynamics/")} == logged - {"dynamics/loss"}


def test_an_offline_run_has_all_of_it(tmp_path, analysis):
    log = WandbLog(str(tmp_path / "run"), "slm", None, None, "train", [], "offline")
    selected = analysis.chooser.selected(analysis.losses[-1], 200)
    log.log_metrics(
        dynamics_metrics(analysis.losses[-1], analysis.trajectories.label, selected), 20
    )
    log.log_media(excess_histograms(analysis.excess_loss(-1), selected), 20, 200)
    log.log_media(final_media(analysis), 20, 200)
    log.log_summary(final_summary(analysis))
    log.finalize("success")
    metrics, histograms, final = wandb_history(tmp_path / "run")
    assert metrics["dynamics/loss/LH"] == 3.0 and metrics["dynamics/share/HL"] == 0.25
    assert sum(histograms["dynamics/excess_loss/values"]) == 12
    assert sum(histograms["dynamics/excess_loss_selected/values"]) == 6
    assert final["data/tokens_seen"] == 200
    table = json.loads(media_file(tmp_path / "run", final, "dynamics/by_class"))
    assert table["columns"][-1] == "kept_frac" and table["data"] == by_class(analysis).rows
    table = json.loads(media_file(tmp_path / "run", final, "dynamics/examples"))
    assert table["data"] == examples(analysis).rows
    page = media_file(tmp_path / "run", final, "dynamics/heat_map")
    assert page == heat_map(analysis).html
    curves = json.loads(media_file(tmp_path / "run", final, "dynamics/loss_by_class_table"))
    assert curves["data"][:3] == [[seen, "HH not learned", 5.0] for seen in (0, 100, 200)]
    summary = wandb_summary(tmp_path / "run")
    assert summary["dynamics/final/share/HH"] == 0.25
    low, high = (summary[f"dynamics/final/share_{end}/HH"] for end in ("low", "high"))
    assert low < 0.25 < high
