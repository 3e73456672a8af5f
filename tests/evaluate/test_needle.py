"""Questions by hand, and models that know the answer, or nothing of it."""

import csv
import math
from typing import Any

import numpy as np
import pytest
import torch

from model_helpers import LLAMA
from slm.errors import UserError
from slm.evaluate import needle as asking
from slm.evaluate.needle import Kind, Sample, answers, batch_of, make_samples, needle, value_nats
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM
from slm.model.folder import save_model
from slm.store.windows import IGNORE_INDEX


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_corpus, tokenizer) -> Any:
    """Two shards of one token each, which no line has."""
    shards = [np.full(161, *tokenizer.encode("#")), np.full(321, *tokenizer.encode("@"))]
    return make_corpus(tmp_path_factory.mktemp("needle") / "corpus", shards, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> str:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("model") / "m"
    model = new_model(LLAMA | {"max_position_embeddings": 256}, 300, None)
    save_model(made, model, tokenizer, "card", {})
    return str(made)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_line_that_is_asked_for_lies_at_its_depth(corpus, tokenizer, depth):
    (found,) = make_samples(corpus, [Kind(250, depth)], 3, 6, 0).values()
    for sample in found:
        text = [int(token) for token in sample.prompt]
        assert len(text) + max(map(len, sample.values)) == 250
        shown = tokenizer.decode(text)
        (filling,) = {"#", "@"} & set(shown)  # of one shard
        said = shown.replace(filling, "")
        lines, question = said.strip("\n").split("\n")[:-1], said.split("\n")[-1]
        pairs = dict(line.removesuffix(".").split(" is") for line in lines if line)
        values = [tokenizer.decode(value.tolist()) for value in sample.values]
        key = question.removesuffix(" is")
        assert len(pairs) == 3 and pairs[key] == values[0]
        assert set(pairs.values()) == set(values) and all(1000 <= int(v) < 10000 for v in values)
        before = shown[: shown.index(f"\n{key} is")].count(filling)
        assert before == round(depth * shown.count(filling))
    others = make_samples(corpus, [Kind(250, depth)], 3, 6, 1)[Kind(250, depth)]
    assert any(not np.array_equal(a.prompt, b.prompt) for a, b in zip(found, others, strict=True))


def test_targets_are_the_values_tokens_alone():
    batch = batch_of([(np.array([1, 2, 3]), np.array([4, 5])), (np.array([6]), np.array([7]))])
    none = IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert batch["targets"].tolist() == [[none, none, 4, 5], [7, none, none, none]]


def test_log_probs_are_the_models_own(folder, corpus):
    from slm.model.build import load_model

    model: Any = load_model(folder)
    (found,) = make_samples(corpus, [Kind(200, 0.5)], 3, 4, 0).values()
    nats = value_nats(SelectiveLM(model).eval(), found, 5, "float32", lambda count: None)
    for sample, row in zip(found, nats, strict=True):
        for value, mine in zip(sample.values, row, strict=True):
            whole = torch.from_numpy(np.concatenate([sample.prompt, value]))
            with torch.no_grad():
                logprobs = model(whole[None]).logits[0].log_softmax(-1)
            places = range(len(sample.prompt) - 1, len(whole) - 1)
            expected = -sum(logprobs[at, whole[at + 1]].item() for at in places)
            assert mine == pytest.approx(expected, abs=1e-4)


def test_found_is_what_is_likelier_than_every_other():
    nats = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 1.0, 3.0]])
    found = answers(nats)
    assert found["accuracy"] == 1 / 3 and found["nats"] == pytest.approx(4 / 3)
    assert found["chance"] == 1 / 3 and found["samples"] == 3
    shares = [math.exp(-row[0]) / sum(math.exp(-n) for n in row) for row in nats]
    assert found["probability"] == pytest.approx(np.mean(shares))


def test_rows_of_the_command(tmp_path, folder, corpus, monkeypatch):
    sets, given = {"s": str(corpus.folder)}, {"samples": 3, "pairs": 2, "depths": [0.0, 1.0]}
    rows = needle({"a": folder}, sets, lengths=[128, 160], out=str(tmp_path / "n.csv"), **given)
    places = [(row["length"], row["depth"]) for row in rows]
    assert places == [(128, 0.0), (128, 1.0), (160, 0.0), (160, 1.0)]
    with open(tmp_path / "n.csv", newline="") as file:
        assert [float(row["nats"]) for row in csv.DictReader(file)] == [row["nats"] for row in rows]
    assert (tmp_path / "n.png").exists()

    def knows(lm: Any, samples: list[Sample], *rest: Any) -> np.ndarray:
        return np.array([[0.1, 5.0] for _ in samples])

    monkeypatch.setattr(asking, "value_nats", knows)
    assert {row["accuracy"] for row in needle({"a": folder}, sets, lengths=[128], **given)} == {1.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": [60]}, "lengths has 60, and 4 pairs with their question take [0-9]+ tokens"),
        ({"lengths": [257]}, "lengths: seq_len is 257, model max_position_embeddings is 256: over"),
        (
            {"lengths": [900], "override": {"max_position_embeddings": 900}},
            "has no shard of the [0-9]+ tokens that lengths asks for",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, corpus, given, message):
    with pytest.raises(UserError, match=message):
        needle({"a": folder}, {"s": str(corpus.folder)}, **given)
