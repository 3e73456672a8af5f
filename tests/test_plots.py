"""The figure holds the numbers it was given; the page shows text as it is and runs none of it."""

import html
import re

import numpy as np
import pytest

from slm.plots import (
    Curve,
    MarkedWindow,
    loss_figure,
    marked_page,
    marked_window,
    read_curve,
    token_pieces,
)


def test_read_curve_reads_one_set_and_skips_rows_without_it(tmp_path):
    (tmp_path / "heldout.csv").write_text(
        "step,tokens_seen,heldout/a/loss,heldout/b/loss\n0,0,5.5,4\n1,128,,3\n2,256,5.25,2\n"
    )
    curve = read_curve(tmp_path, "x", "a")
    assert curve.tokens_seen.tolist() == [0, 256] and curve.loss.tolist() == [5.5, 5.25]


def test_figure_draws_each_run_the_mean_and_the_lines(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    seen = np.array([0, 1_000_000, 2_000_000])
    curves = [
        Curve("all", seen, np.array([9.0, 5.0, 4.0])),
        Curve("all", seen, np.array([9.0, 7.0, 2.0])),
        Curve("excess", seen, np.array([9.0, 4.0, 1.0])),
    ]
    loss_figure(curves, {"reference": 2.5}, "title", tmp_path / "f.png", start=1)
    monkeypatch.undo()
    axes = kept[0].axes[0]
    labelled = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(labelled["all (3.000)"]) == [6.0, 3.0]
    assert list(labelled["excess (1.000)"]) == [4.0, 1.0]
    assert set(labelled["reference (2.500)"]) == {2.5}
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    plt.close("all")


@pytest.fixture
def window() -> MarkedWindow:
    pieces = ["<script>alert('x')</script>", "a & b", ' "q"', "\n"]
    selected = np.array([True, False, True, False])
    return MarkedWindow("<b>.py", pieces, selected, np.array([3.0, 1.0, 2.5, 0.5]), np.ones(4))


def test_page_escapes_text_and_marks_exactly_the_selected(window, tmp_path):
    found = marked_window(window)
    assert "<script>" not in found and "<b>" not in found
    spans = re.findall(r'<span( class="s")? title="([^"]*)">(.*?)</span>', found, re.DOTALL)
    assert [bool(mark) for mark, _, _ in spans] == window.selected.tolist()
    assert [html.unescape(text) for _, _, text in spans] == list(window.pieces)
    assert spans[0][1] == "loss 3.00, reference 1.00, excess +2.00"
    assert "50% selected" in found
    marked_page([window], "T", "lead", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "http" not in page and page.count("<pre>") == 1


def test_pieces_join_to_the_text_even_where_a_character_is_split():
    text = "a\u00e9\U0001f600b"
    data = text.encode()
    parts = [data[:2], data[2:4], data[4:6], data[6:]]

    def decode(ids) -> str:
        return b"".join(parts[i] for i in ids).decode(errors="replace")

    pieces = token_pieces([0, 1, 2, 3], decode)
    assert "".join(pieces) == text
    assert pieces == ["a", "\u00e9", "", "\U0001f600b"]
    assert token_pieces([1], decode) == [data[2:4].decode(errors="replace")]
