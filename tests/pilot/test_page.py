"""What the page shows, and how it writes numbers; the whole of it is in test_command.py."""

import re

import pytest

from slm.pilot.page import (
    Scale,
    amount,
    chart,
    count,
    ends,
    nats,
    nice,
    render,
    scale_of,
    share,
    whole,
)

NONE = {"mean": None, "low": 0.2, "high": None}
ROW = {
    "set": "math",
    "arm": "excess k = 0.5",
    "minus": "all tokens",
    "answer": "better",
    "mean": -0.2,
    "low": -0.3,
    "high": -0.1,
    "seeds": 3,
    "documents": 1234,
}


def found() -> dict:
    arms = ["all tokens", "excess k = 0.5"]
    return {
        "inputs": {"corpus": "a/b", "reference_model": "r", "base": "b", "curated": None},
        "verdict": {"sentence": "Select at k = 0.5: <b>."},
        "tokens_per_arm": 1000,
        "target_tokens": 2_000_000,
        "seeds": {"all tokens": 4, "excess k = 0.5": 3},
        "rules": {"level": 0.05, "level_each": 0.0125, "margin": 0.01, "has_mixed": False},
        "questions": [ROW],
        "beside": [ROW | {"answer": "open"}],
        "elsewhere": [ROW | {"set": "else", "mean": 0.4, "high": 0.5, "answer": "worse"}],
        "to_equal_loss": [
            {"select_ratio": 0.5, "tokens": NONE, "reached": "no"}
            | {"flops": None, "seconds": None, "clock": [0.9]}
        ],
        "keep_rates": {"0.5": {"a<script>": 0.25}},
        "samples": {"seed 0": {"tokens": 9, "by_source": {"a<script>": 5, "b": 4}}},
        "heldout": {"math": {"documents": 12, "targets": 3456}},
        "arms": [
            {"arm": arm, "set": "math", "mean": 4.0, "low": 3.9, "high": 4.1, "seeds": 3}
            for arm in arms
        ],
        "curves": {
            "set": "math",
            "tokens_seen": [0, 500, 1000],
            "loss": {"all tokens": [9.0, 5.0, 4.0], "excess k = 0.5": [9.0, 4.5, 3.8]},
        },
        "costs": dict.fromkeys(("train_seconds", "train_flops", "score_seconds", "score_flops"))
        | {"reference_train_seconds": None, "reference_train_flops": None}
        | {"train_tokens": 2000, "devices": ["cpu"]},
        "overhead": {"overhead": 0.0123},
    }


def test_every_number_is_there_and_no_text_is_markup():
    page = render(found())
    assert "Select at k = 0.5: &lt;b&gt;." in page
    assert "<script" not in page and "a&lt;script&gt;" in page
    text = re.sub(r"<[^>]+>", " ", page)
    for wanted in ("-0.2000", "-0.3000 to -0.1000", "1,234", "not reached", "not measured", "25%"):
        assert wanted in text
    assert "0.90 to 0.90 at k = 0.5, by seed" in text
    assert "3 to 4 seeds" in text and "1.2% of the time" in text and "curated=" in text
    assert page.count("<polyline") == 2 and 'class="worse" x1' in page


def test_an_interval_lies_where_its_numbers_are():
    scale = scale_of([ROW])
    assert scale.at(0) > scale.at(ROW["high"]) > scale.at(ROW["mean"]) > scale.at(ROW["low"]) > 0
    assert Scale(-1, 1).at(0) == 50
    assert scale_of([ROW | {"mean": 0, "low": 0, "high": 0}]).at(0) == 50


def test_a_steep_start_does_not_flatten_the_rest():
    drawn = chart(found()["curves"])
    points = [[float(p.split(",")[1]) for p in one["points"].split()] for one in drawn["lines"]]
    assert points[0][0] < 0  # 9 nats lie above the picture
    assert points[1][2] - points[1][1] > 100 and drawn["ends"][1][1] == "1,000"
    assert len(drawn["ticks"]) >= 3


@pytest.mark.parametrize(("low", "high"), [(3.8, 5.1), (4.01, 4.02), (0.9, 100)])
def test_ticks_are_round_and_a_few(low, high):
    found = nice(low, high)
    assert 3 <= len(found) <= 11 and all(low <= tick <= high for tick in found)


def test_numbers_are_short():
    assert [share(v) for v in (0.352, 0.0123, None)] == ["35%", "1.2%", "not reached"]
    assert [count(v) for v in (1_234_567, 950, 3.25, 2e12)] == ["1.23M", "950", "3.2", "2T"]
    assert [whole(v) for v in (0.16, 1.0, 2.1, None)] == ["1", "1", "3", "not reached"]
    assert ends({"low": 0.2, "high": None}, "share") == "(20% to not reached)"
    assert [nats(-0.1), nats(None), amount(None), amount(12345.0)] == [
        "-0.1000",
        "–",
        "not measured",
        "1.23e+04",
    ]
