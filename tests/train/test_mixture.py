"""Shares of tokens: what is asked, what is read, and what a run says of it."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from run_helpers import train
from slm.errors import UserError
from slm.train.data import TokenData
from slm.train.mixture import Mixture
from slm.train.order import Steps
from train_helpers import compose_train, crash_at, rows

SEQ_LEN = 16


@pytest.fixture
def parts(tmp_path, make_corpus, make_references):
    """40 windows of one, 10 of the other, each with scores."""
    found = {}
    for name, share, windows in (("web", 0.75, 40), ("math", 0.25, 10)):
        ids = np.arange(windows * SEQ_LEN + 1) % 200
        corpus = make_corpus(tmp_path / name, [ids], SEQ_LEN)
        scores = -np.random.default_rng(windows).uniform(0, 8, len(ids))
        references = make_references(tmp_path / f"{name}_scores", corpus, [scores])
        found[name] = {
            "corpus": str(corpus.folder),
            "references": str(references.folder),
            "share": share,
        }
    return found


def word(parts) -> str:
    """As a user writes it."""
    quoted = {
        name: ", ".join(f"{key}: {json.dumps(value)}" for key, value in part.items())
        for name, part in parts.items()
    }
    return "data.mixture={" + ", ".join(f"{n}: {{{part}}}" for n, part in quoted.items()) + "}"


def settings(out, parts, *words: str):
    words = ("selection=excess", "max_tokens=2048", "data.corpus=null", *words)
    return compose_train(out, parts["web"]["corpus"], word(parts), *words)


def test_a_run_reads_the_shares_goes_on_and_says_what_it_read(tmp_path, parts, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(whole, parts))
    crash_at(monkeypatch, 9)
    with pytest.raises(RuntimeError, match="crash"):
        train(settings(cut, parts))
    crash_at(monkeypatch, None)
    train(settings(cut, parts))
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows(whole / "train.csv") == rows(cut / "train.csv")
    with open(whole / "mixture.csv", newline="") as file:
        table = {row["part"]: row for row in csv.DictReader(file)}
    # 128 windows are a block of the order: 96 and 32 of them.
    assert [table[name]["share_read"] for name in parts] == ["0.75", "0.25"]
    assert [float(table[name]["epochs"]) for name in parts] == [96 / 40, 32 / 10]
    assert [int(table[name]["unique_tokens"]) for name in parts] == [40 * 16, 10 * 16]
    kept = [float(row["slm/kept_frac/math"]) for row in rows(whole / "train.csv")]
    assert float(table["math"]["kept_frac"]) == pytest.approx(np.mean(kept))
    with pytest.raises(UserError, match="data.mixture.web is 0.75 in run.json, 0.5 now"):
        parts["web"]["share"] = parts["math"]["share"] = 0.5
        train(settings(whole, parts))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_and_micro_batches_read_one_order(parts, ranks):
    """Of the first eight steps: whatever the split, the windows that Mixed names."""
    arguments = (None, None, None, {}, 1, 8, 2, 0, "size", 3)
    data = TokenData(*arguments, mixture=parts)
    order = data.samples()
    expected, epochs = order.samples(0, 64)
    found = [
        [Steps(data.windows, order, 8, 2, rank, ranks)[step] for rank in range(ranks)]
        for step in range(8)
    ]
    for step, by_rank in enumerate(found):
        turns = zip(*by_rank, strict=True)
        batches = [batch for turn in turns for batch in turn]
        numbers = torch.cat([batch["window"] for batch in batches])
        assert numbers.tolist() == expected[8 * step : 8 * step + 8].tolist()
        mine = torch.cat([batch["epoch"] for batch in batches])
        assert mine.tolist() == epochs[8 * step : 8 * step + 8].tolist()


def test_what_a_part_may_be_read_is_checked_before_the_run(parts):
    parts["math"]["max_epochs"] = 3
    mixture = Mixture.open(parts, "size")
    mixture.check_epochs(120, 0)  # 30 of its 10 windows
    message = "^data.mixture.math.max_epochs is 3, and a share of 0.25 .* its 10 windows 3.20 times"
    with pytest.raises(UserError, match=message):
        mixture.check_epochs(128, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.5}, "the shares of data.mixture sum to 1.25, not to 1: web 0.75, math 0.5"),
        (
            {"share": 1e-6},
            "data.mixture.math.share is 1e-06, less than 1e-05: a window in 1,000,000",
        ),
        ({"share": 0}, r"data.mixture.math.share is 0, it must be a number in \(0, 1\]"),
        ({"shares": 1}, "data.mixture.math.shares is given.*did you mean data.mixture.math.share"),
        ({"references": None}, "data.mixture.web has references and data.mixture.math has none"),
        ({"corpus": "nowhere"}, "nowhere is not a finished corpus"),
        ({"max_epochs": 0}, "data.mixture.math.max_epochs is 0, it must be"),
    ],
)
def test_a_wrong_part_is_refused_by_its_key(parts, change, message):
    parts["math"] |= change
    with pytest.raises(UserError, match=message):
        Mixture.open(parts, "size")


def test_a_part_without_a_share_or_no_part_is_refused(parts):
    del parts["math"]["share"]
    with pytest.raises(UserError, match="^data.mixture.math has no share$"):
        Mixture.open(parts, "size")
    with pytest.raises(UserError, match="^data.mixture names no part"):
        Mixture.open({}, "size")
