"""The set of paper figures: which are written of which run, under what names."""

import logging
from functools import partial

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text

from figure_helpers import (
    ALL,
    PIECES,
    RANDOM,
    Make,
    assert_files,
    lines_of,
    losses_of,
    make_analysis,
    rows_of,
)
from slm.report.paper.figures import file_names, paper_figures
from slm.report.paper.text import text_figure
from slm.train.curves import Curve

KINDS = ("classes", "text-classes", "text-selected", "selection", "perplexity")  # file names


@pytest.fixture
def make(tmp_path) -> Make:
    return partial(make_analysis, tmp_path)


def test_dollars_start_no_formula(make, tmp_path, kept):
    text = {number: b"$\\x$" for number in range(len(PIECES))}  # no formula that could be drawn
    run = make(r"a $\x$")
    object.__setattr__(run.store.tokens, "pieces", text)
    control = make(r"b $\x$", ALL)
    curve = Curve(run.name, np.array([0, 1]), np.array([1.0, 2.0]))
    paper_figures([run, control], tmp_path / "out", [curve], r"c $\x$")
    found = [text for figure in kept for text in figure.findobj(Text)]
    assert not [t.get_text() for t in found if t.get_parse_math() and is_math_text(t.get_text())]
    shown = [text.get_text() for text in kept[0].axes[1].get_legend().get_texts()]
    assert [text.replace(r"\$", "$") for text in shown] == ["\u201c$\\x$\u201d"] * 3


@pytest.mark.usefixtures("sketched")
def test_all_figures_that_can_be_drawn_are_written(make, tmp_path, caplog, kept):
    caplog.set_level(logging.INFO)
    runs = [make("excess 0.5"), make("other", ALL, plan={"windows_sha256": "w1"})]
    runs += [make("a/b $c$", ALL, losses_of(4, 5)), make("random", RANDOM)]
    runs += [make("blind", references=False)]
    curve = Curve("excess 0.5", np.array([0, 100]), np.array([3.0, 2.0]))
    stranger = curve._replace(label="stranger")
    found = paper_figures(runs, tmp_path / "out", [curve, stranger])
    every = {f"{kind}-{name}.png" for kind in ("classes", "text-classes") for name in NAMES}
    selecting = {f"{kind}-excess_0.5.png" for kind in ("text-selected", "selection", "perplexity")}
    assert {path.name for path in found} == every | selecting
    assert {kind for kind in KINDS if any(path.name.startswith(f"{kind}-") for path in found)} == {
        *KINDS
    }
    for path in found:
        assert path.name.startswith(KINDS)
        assert path.exists() and path.with_suffix(".svg").exists() and rows_of(path)
    panels = {key for key in lines_of(tmp_path / "out" / "selection-excess_0.5.png")}
    assert ("selected", "a/b $c$") in panels and ("heldout", "excess 0.5") in panels
    text = caplog.text
    assert "other is no control of excess 0.5" in text and "windows_sha256 is w0 and w1" in text
    assert "random: figures of what is selected do not apply to random k = 0.5" in text
    assert "blind has no reference scores" in text and "needs them" in text
    assert all("\n" not in record.message for record in caplog.records)


NAMES = ("excess_0.5", "other", "a_b_c", "random", "blind")


@pytest.mark.usefixtures("sketched")
def test_without_a_control_the_run_stands_alone(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = paper_figures([make(start=999_999)], tmp_path / "out")
    assert {path.stem for path in found} == {
        f"{kind}-run" for kind in ("classes", "text-classes", "text-selected", "selection")
    }
    assert "run: no run on all tokens stands beside it" in caplog.text
    assert "perplexity is not drawn" in caplog.text


def test_the_same_losses_give_the_same_bytes(make, tmp_path):
    runs = [make(losses=losses_of(0, 6)), make("control", ALL, losses_of(1, 6))]
    for folder in ("one", "two"):
        paper_figures(runs, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 7 * 3
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        if name.endswith(".png"):
            assert_files(tmp_path / "one" / name)
        if name.endswith(".svg"):
            assert "<dc:date>" not in (tmp_path / "one" / name).read_text(encoding="utf-8")


@pytest.mark.usefixtures("sketched")
def test_another_seed_shows_other_text_and_tokens(make, tmp_path):
    run = make()
    for seed in (0, 1):
        text_figure(run, tmp_path / f"{seed}.png", seed=seed)
    assert rows_of(tmp_path / "0.png") != rows_of(tmp_path / "1.png")


def test_file_names_are_safe_and_differ(make):
    runs = [make(name) for name in ("a/b c", "a b/c", "..", "a_b_c")]
    assert file_names(runs) == ["a_b_c", "a_b_c~2", "run", "a_b_c~3"]
