"""Every number drawn is counted here again, in plain loops over the losses."""

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
    assert_drawn,
    assert_files,
    lines_of,
    losses_of,
    make_analysis,
    masks_of,
    rows_of,
)
from slm.dynamics.classes import CLASSES
from slm.errors import UserError
from slm.report.paper.figures import (
    class_figure,
    control_of,
    file_names,
    paper_figures,
    perplexity_figure,
    selection_figure,
    share_text,
    spread_checkpoints,
)
from slm.report.paper.text import text_figure
from slm.train.curves import Curve

KINDS = ("classes", "text-classes", "text-selected", "selection", "perplexity")  # file names


@pytest.fixture
def make(tmp_path) -> Make:
    return partial(make_analysis, tmp_path)


# ---- classes ------------------------------------------------------------------------------------


def test_classes_and_tokens_are_counted_by_hand(make, tmp_path, kept):
    run = make(losses=losses_of(1, 9))
    class_figure(run, tmp_path / "c.png", num_tokens=2)
    assert_files(tmp_path / "c.png")
    lines, label = lines_of(tmp_path / "c.png"), run.trajectories.label
    for index, name in enumerate(CLASSES):
        for at, column in enumerate(run.losses):
            mine = [float(loss) for loss, kind in zip(column, label, strict=True) if kind == index]
            assert lines["classes", name][100_000 * at] == pytest.approx(np.mean(mine))
    for number, name in ((1, "LL"), (2, "HH")):
        tokens = {int(k[1]): line for k, line in lines.items() if k[0] == name}
        assert len(tokens) == 2
        for target, line in tokens.items():
            assert label[target] == CLASSES.index(name)
            assert list(line.values()) == [column[target] for column in run.losses]
        assert_drawn(kept[0].axes[number], list(tokens.values()))
    assert_drawn(kept[0].axes[0], [lines["classes", name] for name in CLASSES])
    shown = [text.get_text() for text in kept[0].axes[0].get_legend().get_texts()]
    expected = [f"{100 * np.mean(label == index):.0f}" for index in range(4)]
    assert shown == [
        f"{name[0]}\u2192{name[1]} ({share}% of tokens)"
        for name, share in zip(CLASSES, expected, strict=True)
    ]


def test_a_class_of_few_tokens_is_not_said_to_have_none():
    shares = (0.0001, 0.0099, 0.01, 0.256, 0.999, 1.0)
    assert [share_text(share) for share in shares] == [
        *("under 1%", "under 1%", "1%", "26%", "100%", "100%")
    ]


def test_the_tokens_shown_are_among_the_most_restless(make, tmp_path):
    losses = losses_of(0, 9)
    restless = [3, 7]  # kind 3: L->L
    losses[::2, restless] += 0.4
    class_figure(make(losses=losses), tmp_path / "c.png", num_tokens=2)
    assert {k[1] for k in lines_of(tmp_path / "c.png") if k[0] == "LL"} == {"3", "7"}


def test_dollars_start_no_formula(make, tmp_path, kept):
    text = {number: b"$\\x$" for number in range(len(PIECES))}  # no formula that could be drawn
    run = make(r"a $\x$")
    object.__setattr__(run.store.tokens, "pieces", text)
    control = make(r"b $\x$", ALL)
    text_figure(run, tmp_path / "t.png")
    class_figure(run, tmp_path / "c.png")
    selection_figure(run, control, tmp_path / "s.png", heldout_name=r"c $\x$")
    perplexity_figure(run, tmp_path / "p.png")
    found = [text for figure in kept for text in figure.findobj(Text)]
    assert not [t.get_text() for t in found if t.get_parse_math() and is_math_text(t.get_text())]
    shown = [text.get_text() for text in kept[1].axes[1].get_legend().get_texts()]
    assert [text.replace(r"\$", "$") for text in shown] == ["\u201c$\\x$\u201d"] * 3


def test_a_class_without_tokens_has_no_lines(make, tmp_path, kept):
    losses = losses_of(0, 4)
    losses[:, :] = np.linspace(5, 1, 4)[:, None]
    class_figure(make(losses=losses), tmp_path / "c.png")
    assert set(lines_of(tmp_path / "c.png")) == {("classes", "HL")}
    assert kept[0].axes[1].get_title("left") == "(b) no tokens of L\u2192L"


def test_of_a_thousand_checkpoints_a_token_shows_some(make, tmp_path):
    class_figure(make(losses=losses_of(0, 400)), tmp_path / "c.png", num_tokens=1)
    lines = {key[0]: line for key, line in lines_of(tmp_path / "c.png").items()}
    assert len(lines["classes"]) == 400 and len(lines["HH"]) == 48
    assert min(lines["HH"]) == 0 and max(lines["HH"]) == 39_900_000


# ---- selection ----------------------------------------------------------------------------------


def test_selection_is_counted_by_hand_in_both_runs(make, tmp_path, kept):
    run = make(losses=losses_of(0, 5))
    control = make("all tokens", ALL, losses_of(7, 3), every=200_000, references=False)
    curves = [
        Curve("run", np.array([0, 100]), np.array([3.0, 2.0])),
        Curve("all tokens", np.array([0, 300]), np.array([3.0, 2.5])),
    ]
    selection_figure(run, control, tmp_path / "s.png", curves, "curated text")
    assert_files(tmp_path / "s.png")
    lines = lines_of(tmp_path / "s.png")
    for at, mask in enumerate(masks_of(run)):
        column = run.losses[at].astype(np.float64)
        assert lines["selected", "run"][100_000 * at] == pytest.approx(column[mask].mean())
        assert lines["unselected", "run"][100_000 * at] == pytest.approx(column[~mask].mean())
    for at in range(3):  # the control's checkpoint i is the run's 2 i
        mask, column = masks_of(run)[2 * at], control.losses[at].astype(np.float64)
        seen = 200_000 * at
        assert lines["selected", "all tokens"][seen] == pytest.approx(column[mask].mean())
        assert lines["unselected", "all tokens"][seen] == pytest.approx(column[~mask].mean())
    assert list(lines["selected", "all tokens"]) == [0, 200_000, 400_000]
    assert lines["heldout", "all tokens"] == {0: 3.0, 300: 2.5}
    titles = [axes.get_title("left") for axes in kept[0].axes]
    assert titles == ["(a) selected", "(b) curated text", "(c) unselected"]
    for axes, panel in zip(kept[0].axes, ("selected", "heldout", "unselected"), strict=True):
        assert_drawn(axes, [lines[panel, "run"], lines[panel, "all tokens"]])
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["run", "all tokens"]


def test_a_run_alone_has_two_panels_and_nothing_where_all_is_selected(make, tmp_path, kept):
    run = make(start=250_000)
    selection_figure(run, None, tmp_path / "s.png")
    lines = lines_of(tmp_path / "s.png")
    assert set(lines) == {("selected", "run"), ("unselected", "run")}
    assert list(lines["selected", "run"]) == [0, 100_000, 200_000, 300_000, 400_000]
    assert list(lines["unselected", "run"]) == [300_000, 400_000]
    assert lines["selected", "run"][0] == pytest.approx(run.losses[0].mean(dtype=np.float64))
    assert len(kept[0].axes) == 2


@pytest.mark.parametrize("field", ["corpus_fingerprint", "windows_sha256"])
def test_a_control_on_other_tokens_is_refused(make, tmp_path, field):
    run, control = make(), make("control", ALL, plan={field: "other"})
    expected = f"{field} is {run.store.plan[field]} and other"
    with pytest.raises(UserError, match=expected):
        selection_figure(run, control, tmp_path / "s.png")
    assert list(tmp_path.glob("s.*")) == []


def test_a_control_at_other_times_is_refused(make, tmp_path):
    run, control = make(), make("control", ALL, losses_of(1, 3), every=70_000)
    expected = (
        r"1 checkpoints at the same tokens_seen, 2 are needed: "
        r"\[0, 100,000, 200,000, 300,000, \.\.\.\] and \[0, 70,000, 140,000\]"
    )
    with pytest.raises(UserError, match=expected):
        selection_figure(run, control, tmp_path / "s.png")


def test_names_must_tell_the_lines_apart(make, tmp_path):
    run, curve = make(), Curve("x", np.array([0, 1]), np.array([1.0, 2.0]))
    with pytest.raises(UserError, match="held-out curve 'x' is of neither run: run"):
        selection_figure(run, None, tmp_path / "s.png", [curve])
    with pytest.raises(UserError, match="both runs are named run"):
        selection_figure(run, run, tmp_path / "s.png")


# ---- perplexity ---------------------------------------------------------------------------------


def test_perplexity_of_each_set_is_counted_by_hand(make, tmp_path, kept):
    run = make(losses=losses_of(3, 7))
    perplexity_figure(run, tmp_path / "p.png", num=3)
    assert_files(tmp_path / "p.png")
    lines, masks = lines_of(tmp_path / "p.png", "perplexity"), masks_of(run)
    assert [series for _, series in lines] == ["200000", "400000", "600000"]
    for choice in (2, 4, 6):
        for at, column in enumerate(run.losses):
            expected = np.exp(np.mean(column.astype(np.float64)[masks[choice]]))
            found = lines["selected", f"{100_000 * choice}"][100_000 * at]
            assert found == pytest.approx(expected)
    axes = kept[0].axes[0]
    assert_drawn(axes, list(lines.values()))
    points = [line for line in axes.lines if line.get_marker() == "o"]
    for point, choice in zip(points, (2, 4, 6), strict=True):
        seen = 100_000 * choice
        assert point.get_xdata()[0] == seen
        assert point.get_ydata()[0] == pytest.approx(lines["selected", f"{seen}"][seen])
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["200k", "400k", "600k"]


def test_checkpoints_are_spread_over_those_at_which_the_rule_selects(make):
    run = make(losses=losses_of(0, 11))
    assert spread_checkpoints(run, 5).tolist() == [2, 4, 6, 8, 10]
    assert spread_checkpoints(run, 1).tolist() == [10]
    late = make("late", losses=losses_of(0, 11), start=550_000)
    assert spread_checkpoints(late, 5).tolist() == [7, 8, 9, 10]
    assert spread_checkpoints(make("few", losses=losses_of(0, 3)), 9).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="starts after 500,000 tokens, .* has seen 400,000"):
        spread_checkpoints(make("never", start=500_000), 5)


# ---- all of them --------------------------------------------------------------------------------


def test_the_control_has_the_runs_own_seed(make):
    runs = [make("all 0", ALL), make("all 1", ALL), make("excess 0.5")]
    for analysis, seed in zip(runs, (0, 1, 1), strict=True):
        analysis.store.plan["run"] = analysis.store.plan["run"] | {"seed": seed}
    assert control_of(runs[2], runs) is runs[1]
    runs[2].store.plan["run"]["seed"] = 7
    assert control_of(runs[2], runs) is runs[0]


def test_all_figures_that_can_be_drawn_are_written(make, tmp_path, caplog, kept):
    caplog.set_level(logging.INFO, "slm.report.paper.figures")
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
        assert_files(path)
        assert rows_of(path)
    panels = {key for key in lines_of(tmp_path / "out" / "selection-excess_0.5.png")}
    assert ("selected", "a/b $c$") in panels and ("heldout", "excess 0.5") in panels
    text = caplog.text
    assert "other is no control of excess 0.5" in text and "windows_sha256 is w0 and w1" in text
    assert "random: figures of what is selected do not apply to random 0.5" in text
    assert "blind: no figures of what is selected" in text and "needs them" in text
    assert all("\n" not in record.message for record in caplog.records)


NAMES = ("excess_0.5", "other", "a_b_c", "random", "blind")


def test_without_a_control_the_run_stands_alone(make, tmp_path, caplog):
    caplog.set_level(logging.INFO, "slm.report.paper.figures")
    found = paper_figures([make(start=999_999)], tmp_path / "out")
    assert {path.stem for path in found} == {
        f"{kind}-run" for kind in ("classes", "text-classes", "text-selected", "selection")
    }
    assert "run: no run on all tokens stands beside it" in caplog.text
    assert "perplexity-run.png is not drawn" in caplog.text


def test_the_same_losses_give_the_same_bytes(make, tmp_path):
    runs = [make(losses=losses_of(0, 6)), make("control", ALL, losses_of(1, 6))]
    for folder in ("one", "two"):
        paper_figures(runs, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 7 * 3
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        if name.endswith(".svg"):
            assert "<dc:date>" not in (tmp_path / "one" / name).read_text(encoding="utf-8")


def test_another_seed_shows_other_text_and_tokens(make, tmp_path):
    run = make()
    for seed in (0, 1):
        text_figure(run, tmp_path / f"{seed}.png", seed=seed)
    assert rows_of(tmp_path / "0.png") != rows_of(tmp_path / "1.png")


def test_file_names_are_safe_and_differ(make):
    runs = [make(name) for name in ("a/b c", "a b/c", "..", "a_b_c")]
    assert file_names(runs) == ["a_b_c", "a_b_c~2", "run", "a_b_c~3"]
