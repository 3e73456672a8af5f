"""The schedule's values where they matter, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from slm.train.optim import adamw, warmup_cosine


def rates(num_steps: int, **schedule: float) -> list[float]:
    """The learning rate of every step of a run; the peak is 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, num_steps, **schedule)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_rate_at_the_start_at_the_peak_half_way_and_at_the_end():
    found = rates(101, warmup_fraction=0.2, final_fraction=0.1)
    assert found[0] == 2.0 / 20
    assert found[:20] == pytest.approx([2.0 * step / 20 for step in range(1, 21)])
    assert found[19] == 2.0
    assert max(found[20:]) < 2.0
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 20 / 81))
    assert found[39] == pytest.approx(2.0 * quarter)
    assert found[100] == pytest.approx(2.0 * 0.1)
    assert found[19:] == sorted(found[19:], reverse=True)


def test_without_warmup_the_first_step_has_the_peak():
    found = rates(5, warmup_fraction=0.0, final_fraction=0.0)
    assert found == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0])


@pytest.mark.parametrize(("num_steps", "fraction"), [(1, 0.05), (1, 1.0), (4, 1.0), (2, 0.5)])
def test_short_runs_and_pure_warmup_have_rates(num_steps, fraction):
    found = rates(num_steps, warmup_fraction=fraction, final_fraction=0.1)
    assert all(0 < rate <= 2.0 for rate in found)
    assert max(found) == 2.0


def test_constant_rate():
    assert rates(4, warmup_fraction=0.0, final_fraction=1.0) == [2.0] * 4


def test_matrices_decay_and_vectors_do_not():
    module = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimizer = adamw(module, lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in module.named_parameters():
        factor = 1 - 0.5 * 0.1 if value.ndim == 2 else 1.0
        torch.testing.assert_close(value.detach(), factor * before[name])


def test_every_trained_parameter_is_in_one_group_and_frozen_ones_in_none():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight  # tied
    module[1].bias.requires_grad_(False)
    optimizer = adamw(module, lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(module[0].weight)], [id(module[0].bias)]]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-6)
