"""AdamW with moments of 8 bits, against AdamW."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from run_helpers import composed
from sharded_helpers import KEPT, cut, on_ranks, words
from slm.errors import UserError
from slm.train.keys import check_train
from slm.train.optim import adamw
from slm.train.optim8bit import Packed, adamw8bit
from train_helpers import same_results

HOW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(100, 50)  # its weight ends within a block


def steps(module: nn.Linear, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            # Gradients of many sizes: a scale is a block's alone.
            sizes = torch.logspace(-3, 0, len(parameter)).view(-1, *[1] * (parameter.ndim - 1))
            parameter.grad = sizes * torch.randn(parameter.shape, generator=random)
        optimizer.step()


def test_it_is_adamw_but_for_eight_bits():
    one, other = layer(), layer()
    eight, exact = adamw8bit(one, **HOW), adamw(other, **HOW)
    steps(one, eight, 0, 20)
    steps(other, exact, 0, 20)
    torch.testing.assert_close(one.bias, other.bias)  # small: in float32
    moved = (other.weight - layer().weight).abs().mean()
    error = (one.weight - other.weight).abs().mean()
    assert 0 < error < 0.05 * moved
    state = eight.state[one.weight]
    held = [part for name in ("exp_avg", "exp_avg_sq") for part in state[name]]
    assert all(isinstance(state[name], Packed) for name in ("exp_avg", "exp_avg_sq"))
    assert sum(part.nbytes for part in held) <= 2.05 * one.weight.numel()


def test_a_checkpoint_is_that_of_adamw_and_it_goes_on_from_it_bit_for_bit():
    module = layer()
    optimizer = adamw8bit(module, **HOW)
    steps(module, optimizer, 0, 5)
    saved, again = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module)
    exact = adamw(copy.deepcopy(module), **HOW)
    exact.load_state_dict(saved)  # of its shapes and types
    fresh = adamw(layer(), **HOW)
    steps(layer(), fresh, 0, 1)
    assert {n: {*s} for n, s in saved["state"].items()} == {
        number: {"step", "exp_avg", "exp_avg_sq"} for number in (0, 1)
    }
    assert saved["state"][0]["exp_avg"].dtype == torch.float32
    assert saved["param_groups"][0].keys() == exact.state_dict()["param_groups"][0].keys()
    other = adamw8bit(again, **HOW)
    other.load_state_dict(saved)
    steps(module, optimizer, 5, 9)
    steps(again, other, 5, 9)
    assert torch.equal(module.weight, again.weight) and torch.equal(module.bias, again.bias)


def test_without_the_library_it_is_refused_at_once(monkeypatch):
    made = dict(composed("train", "optimizer=adamw8bit").optimizer.adamw)
    settings = {"optimizer": {"adamw": made}, "data": {"corpus": "x"}, "stages": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'slm-trainer\[adamw8bit\]'"):
        check_train(settings)


@pytest.mark.slow
def test_a_run_in_shards_goes_on_bit_for_bit(tmp_path, text_corpus):
    more = (*KEPT, "optimizer=adamw8bit", "model.architecture.hidden_size=64")
    whole = tmp_path / "whole"
    on_ranks(2, words(whole, text_corpus, *more))
    on_ranks(2, words(cut(whole, tmp_path / "again"), text_corpus, *more))
    same_results(whole, tmp_path / "again")
