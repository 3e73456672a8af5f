"""Completions have the chain's probabilities, as many tokens as there is room for, and a seed."""

import numpy as np
import pytest
import torch

from pivot_helpers import STEPS, save_chain
from slm.errors import UserError
from slm.evaluate.generation import Sampling
from slm.pivots.sampling import OwnModel, pieces
from slm.pivots.search import Node


@pytest.fixture(scope="module")
def chain(tmp_path_factory, bytes_folder):
    folder = tmp_path_factory.mktemp("chain") / "model"
    return str(folder), save_chain(folder, bytes_folder)


def sampler(chain, batch_size: int = 64, seed: int = 0, most: int = 8) -> OwnModel:
    folder, tokenizer = chain
    prompts = {"long": tokenizer.encode("what does it say:"), "short": tokenizer.encode(":")}
    how = Sampling(most, 1.0, 1.0)
    rest = {"batch_size": batch_size, "dtype": "float32", "device": "cpu"}
    return OwnModel(folder, tokenizer.eos_token_id, prompts, how, seed=seed, **rest)


def nodes(chain, *places: tuple[str, str]) -> list[Node]:
    _, tokenizer = chain
    return [Node(question, tuple(tokenizer.encode(text))) for question, text in places]


PLACES = [("long", ""), ("short", "ab"), ("long", "abc"), ("short", "abd"), ("short", "")]


def test_completions_follow_the_chain(chain):
    _, tokenizer = chain
    model, asked = sampler(chain, batch_size=100), nodes(chain, *PLACES)
    found = dict(zip(asked, model.sample(asked, 300, "search"), strict=True))
    for (_, text), node in zip(PLACES, asked, strict=True):
        said = [tokenizer.decode(draw.ids[:-1]) for draw in found[node]]
        assert all(draw.ids[-1] == tokenizer.eos_token_id for draw in found[node])
        assert all((text + one)[:2] == "ab" for one in said)
        ends = {"": 0.5, "ab": 0.5, "abc": 0.9, "abd": 0.1}
        share = np.mean([one.endswith("1") for one in said])
        assert len(said) == 300 and share == pytest.approx(ends[text], abs=0.1)


def test_each_has_the_room_that_its_prefix_leaves(chain):
    model, asked = sampler(chain, most=4), nodes(chain, *PLACES)
    lengths = [[len(d.ids) for d in draws] for draws in model.sample(asked, 3, "search")]
    assert lengths == [[4] * 3, [2] * 3, [1] * 3, [1] * 3, [4] * 3]  # none is there for the EOS


def test_draws_are_of_the_seed_and_the_phase_and_leave_others_alone(chain):
    asked = nodes(chain, *PLACES)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = sampler(chain).sample(asked, 20, "search")
    assert torch.rand(1) == expected
    assert sampler(chain).sample(asked, 20, "search") == first
    assert sampler(chain).sample(asked, 20, "confirm") != first
    assert sampler(chain, seed=1).sample(asked, 20, "search") != first


def test_batches_hold_neighbours_and_no_more_rows_than_asked(chain, monkeypatch):
    model, asked = sampler(chain, batch_size=64), nodes(chain, *PLACES)
    batches = model.batches(asked, 32)
    assert [[(n.question, len(n.prefix)) for n in batch] for batch in batches] == [
        [("short", 0), ("long", 0)],
        [("short", 2), ("short", 3)],
        [("long", 3)],
    ]
    assert [len(batch) for batch in model.batches(asked, 100)] == [1] * 5
    assert pieces(100, 64) == [64, 36] and pieces(5, 2) == [2, 2, 1]
    rows = []
    generate = model.model.generate
    monkeypatch.setattr(
        model.model,
        "generate",
        lambda **given: rows.append(len(given["input_ids"])) or generate(**given),
    )
    model.sample(asked[:1], 100, "search")
    assert max(rows) == 64


def test_log_probs_are_those_of_the_chain(chain):
    _, tokenizer = chain
    ids = [*tokenizer.encode("abd1"), tokenizer.eos_token_id]
    for question in ("long", "short"):
        found = sampler(chain).logprobs(question, ids)
        shares = [1, 1, STEPS["b"]["d"], STEPS["d"]["1"], 1]
        assert np.exp(found) == pytest.approx(shares, abs=1e-4)


def test_it_is_refused_where_no_room_is(chain):
    with pytest.raises(UserError, match="prompt has 17 tokens and max_new_tokens is 60, .* 64"):
        sampler(chain, most=60)
