"""What the page shows of tokens: texts of odd bytes, numbers as the analysis has them."""

import base64

import numpy as np
import pytest

from page_helpers import make_analysis, make_token_set, prose
from slm.dynamics.classes import CLASSES, draw_examples
from slm.dynamics.token_set import in_context
from slm.report.page.tokens import (
    Sample,
    draw_sample,
    excess_limit,
    loss_paths,
    numbers,
    partial_bytes,
    shown_targets,
    token_columns,
    window_texts,
)
from slm.score.token_texts import whole_characters


def test_a_split_character_stands_at_the_token_that_completes_it():
    pieces = [b"a", b"\xe2\x80", b"\x99", b"s", b"\xf0\x9f", b"\x98", b"\x80!", b"\xff", b"\xc3"]
    assert whole_characters(pieces) == [
        "a",
        "",
        "\u2019",
        "s",
        "",
        "",
        "\U0001f600!",
        "\ufffd",
        "\ufffd",
    ]
    assert partial_bytes(pieces) == {
        1: "e2 80", 2: "99", 4: "f0 9f", 5: "98", 6: "80 21", 7: "ff", 8: "c3",
    }  # fmt: skip
    whole = ["שלום", "مرحبا", "a\tb\r\n", "<b>", "日本", ""]
    pieces = [text.encode() for text in whole]
    assert whole_characters(pieces) == whole and partial_bytes(pieces) == {}


def test_a_sample_is_whole_windows_within_both_limits():
    tokens = make_token_set(prose(30, 11))  # windows of 10 targets
    assert draw_sample(tokens, 24, 12_000, 0).rows.tolist() != list(range(24))
    for windows, most, expected in [(24, 12_000, 24), (24, 55, 5), (100, 12_000, 30)]:
        sample = draw_sample(tokens, windows, most, 0)
        assert len(set(sample.rows.tolist())) == expected and sample.width == 10
        assert len(sample.rows) == expected
    assert draw_sample(tokens, 24, 4, 0)._replace(rows=np.array([])).width == 4
    assert len(draw_sample(tokens, 24, 4, 0).rows) == 1
    again, other = draw_sample(tokens, 5, 100, 1), draw_sample(tokens, 5, 100, 2)
    assert again.rows.tolist() == draw_sample(tokens, 5, 100, 1).rows.tolist()
    assert again.rows.tolist() != other.rows.tolist()


def test_shown_targets_are_the_live_positions_of_the_shown_windows():
    tokens = make_token_set(prose(3, 6), dead=2)  # 3 + 5 + 5 targets
    assert shown_targets(tokens, Sample(np.array([0, 2]), 5)).tolist() == [
        0,
        1,
        2,
        8,
        9,
        10,
        11,
        12,
    ]
    assert shown_targets(tokens, Sample(np.array([0, 1]), 4)).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_window_texts_say_which_tokens_are_targets():
    tokens = make_token_set([[b"<s>", b"\xc3", b"\xa4", b"x"], [b"p", b"q", b"r", b"x"]], dead=1)
    first, second = window_texts(tokens, Sample(np.array([0, 1]), 3))
    assert first["texts"] == ["<s>", "", "ä", "x"] and first["bytes"] == {1: "c3", 2: "a4"}
    assert first["live"] == [0, 1, 1, 0] and second["live"] == [0, 1, 1, 1]
    assert first["window"] == 0 and second["window"] == 3
    assert second["ids"] == tokens.tokens[1].tolist()


def test_columns_are_the_numbers_of_the_analysis(tmp_path):
    analysis = make_analysis(tmp_path, prose(4, 9))
    chosen = np.array([0, 3, 17, 30])
    found, columns = analysis.trajectories, token_columns(analysis, chosen)
    assert columns["class"] == found.label[chosen].tolist()
    pairs = {
        "first": analysis.losses[0],
        "last": analysis.losses[-1],
        "start": found.start,
        "end": found.end,
        "delta": found.end - found.start,
        "variance": found.variance,
        "reference": analysis.tokens.columns["reference_loss"],
        "excess": analysis.losses[-1] - analysis.tokens.columns["reference_loss"],
    }
    for name, column in pairs.items():
        assert columns[name] == pytest.approx(column[chosen], abs=6e-4), name
    assert analysis.kept is not None
    for name, column in {
        "times": analysis.kept.times,
        "crossings": found.crossings,
        "first_below": found.first_below,
        "source": analysis.tokens.columns["source"],
    }.items():
        assert columns[name] == column[chosen].tolist(), name


def test_without_references_the_columns_are_absent(tmp_path):
    analysis = make_analysis(tmp_path, prose(2, 9), references=False)
    assert not {"reference", "excess", "times"} & token_columns(analysis, np.arange(3)).keys()
    assert excess_limit(analysis) is None


def test_colours_end_where_98_of_100_tokens_lie(tmp_path):
    analysis = make_analysis(tmp_path, prose(8, 33))
    limit, columns = excess_limit(analysis), token_columns(analysis, np.arange(200))
    assert limit is not None
    share = np.mean(np.abs(columns["excess"]) <= limit + 0.05)
    assert 0.96 <= share <= 1


def test_examples_are_of_their_class_and_in_their_text(tmp_path):
    analysis = make_analysis(tmp_path, prose(8, 33), dead=7)
    label = analysis.trajectories.label
    groups = draw_examples(label, 5, 0)
    for number, group in enumerate(groups):
        assert (label[group] == number).all()
        assert len(group) == min(5, np.count_nonzero(label == number))
    assert len(groups) == len(CLASSES)
    pieces = analysis.tokens.pieces
    for target in (0, 24, 25, 40):  # the first window has 25 targets
        entry = in_context(analysis.tokens, target)._asdict()
        assert entry["text"].encode() == pieces[int(analysis.tokens.targets[target])]
        row = analysis.tokens.tokens[entry["window"] // 3]
        whole = b"".join(pieces[int(token)] for token in row).decode()
        assert entry["before"] + entry["text"] + entry["after"] in whole


def test_paths_are_the_losses_at_some_checkpoints(tmp_path):
    analysis = make_analysis(tmp_path, prose(4, 9), checkpoints=31)
    chosen = np.array([2, 9, 30])
    found = loss_paths(analysis.losses, chosen)
    values = np.frombuffer(base64.b64decode(found["bytes"]), np.uint8).reshape(3, found["points"])
    expected = np.stack([analysis.losses[place][chosen] for place in range(0, 31, 2)], axis=1)
    np.testing.assert_allclose(values / 255 * found["top"], expected, atol=found["top"] / 500)
    few = loss_paths(analysis.losses[:3], chosen)
    assert few["points"] == 3 and len(base64.b64decode(few["bytes"])) == 9


def test_numbers_are_json():
    assert numbers(np.array([1.23456, np.nan, -0.0001, np.inf])) == [1.235, None, 0.0, None]
    assert str(numbers(np.array([-0.0001]))[0]) == "0.0"


def test_labels_are_in_the_tooltip(tmp_path):
    analysis = make_analysis(tmp_path / "a", prose(3, 9))
    assert "label" not in token_columns(analysis, np.arange(3))
    signal = np.array([1, 0, -1] * 8, np.int8)[: analysis.tokens.num_targets]
    analysis.tokens.columns["signal"] = signal  # type: ignore[index]
    words = token_columns(analysis, np.arange(1, 4))["label"]
    assert words == ["noise", "neither", "signal"]
