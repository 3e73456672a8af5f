"""Each token stands once, with its numbers and on its colour."""

from collections import defaultdict
from functools import partial
from typing import Any

import pytest
from matplotlib.colors import to_rgb

from figure_helpers import (
    PIECES,
    Make,
    T,
    W,
    assert_files,
    make_analysis,
    masks_of,
    rows_of,
)
from slm.dynamics.classes import CLASSES
from slm.dynamics.colours import CLASS_COLOURS, tint
from slm.errors import UserError
from slm.report.paper.text import Excerpt, choose_excerpt, text_figure


@pytest.fixture
def make(tmp_path) -> Make:
    return partial(make_analysis, tmp_path)


def test_text_has_each_token_with_its_numbers_and_colour(make, tmp_path, kept):
    run = make()
    text_figure(run, tmp_path / "t.png", Excerpt(1, 0, T + 1))
    assert_files(tmp_path / "t.png")
    rows, tokens = rows_of(tmp_path / "t.png"), run.tokens
    assert len(rows) == T + 1
    mask, number = masks_of(run)[-1], T  # window 1 begins after the T targets of window 0
    for place, row in enumerate(rows):
        assert (row["window"], row["position"]) == ("10", str(place))
        assert bytes.fromhex(row["bytes"]) == PIECES[int(tokens.tokens[1, place])]
        if place < 4:  # the first token, and the prompt
            assert row["class"] == row["loss_nats"] == row["selected"] == ""
            continue
        assert float(row["loss_nats"]) == run.losses[-1][number]
        assert float(row["reference_loss_nats"]) == tokens.columns["reference_loss"][number]
        assert row["class"] == CLASSES[run.trajectories.label[number]]
        assert row["selected"] == str(int(mask[number]))
        number += 1
    widths = sum(box.get_width() for box in kept[0].axes[0].patches)
    assert widths == sum(len(row["text"]) for row in rows if row["selected"] == "1") > 0


def test_text_by_class_has_the_classes_colours(make, tmp_path, kept):
    run = make(references=False)
    text_figure(run, tmp_path / "t.png", Excerpt(0, 0, 17), by="class")
    rows = rows_of(tmp_path / "t.png")
    assert "selected" not in rows[0] and "reference_loss_nats" not in rows[0]
    widths: dict[Any, int] = defaultdict(int)
    for box in kept[0].axes[0].patches:
        widths[box.get_facecolor()[:3]] += box.get_width()
    for name, colour in CLASS_COLOURS.items():
        assert widths[to_rgb(tint(colour))] == sum(
            len(r["text"]) for r in rows if r["class"] == name
        )


def test_wild_text_is_drawn_without_a_warning(make, tmp_path, kept):
    text_figure(make(), tmp_path / "t.png", Excerpt(0, 0, 16))
    texts = [row["text"] for row in rows_of(tmp_path / "t.png")]
    assert texts[:6] == [" the", " $x^2$", "\n", "", "\U0001f600", "\u0627\u0644"]
    assert texts[6:12] == ["", "\u00e9", "$", "\t", "\x00", "\ufffd"]
    drawn = "".join(text.get_text() for text in kept[0].axes[0].texts)
    assert drawn.startswith("the$x^2$\u21b5\u25a1\u0627\u0644\u00e9$\u21e5\u25a1\ufffd\u25a1_")


def test_an_excerpt_is_drawn_by_seed_and_refused_where_there_is_none(make, tmp_path):
    run = make()
    chosen = {choose_excerpt(run, seed, most=5) for seed in range(200)}
    assert {part.window for part in chosen} == set(range(W))
    assert {(part.start, part.stop) for part in chosen} == {(i, i + 5) for i in range(13)}
    assert choose_excerpt(run, 3) == choose_excerpt(run, 3)
    for part in (Excerpt(W, 0, 3), Excerpt(0, 3, 3), Excerpt(0, 0, 18), Excerpt(-1, 0, 3)):
        with pytest.raises(UserError, match="outside of 6 windows of 17 tokens"):
            text_figure(run, tmp_path / "t.png", part)
    with pytest.raises(UserError, match="by is 'loss'"):
        text_figure(run, tmp_path / "t.png", by="loss")
    with pytest.raises(UserError, match=r"has no reference scores, excess k = 0\.5 needs them"):
        text_figure(make("other", references=False), tmp_path / "t.png")
    assert not (tmp_path / "t.csv").exists()
