"""The definition against closed forms and loops over single tokens."""

import math

import pytest
import torch

from slm_kernels.contracts import Head
from slm_kernels.reference import logits, token_stats, weighted_sum


def test_two_words_have_the_logistic_loss():
    # z = (a, 0): p(0) = 1 / (1 + exp(-a)).
    hidden = torch.tensor([[3.0], [-2.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    stats = token_stats(hidden, Head(weight, None, 1.0, None), torch.tensor([0, 1]), True, True)
    torch.testing.assert_close(
        stats.loss,
        torch.tensor([math.log1p(math.exp(-3)), math.log1p(math.exp(-2))], dtype=torch.float64),
    )
    p = 1 / (1 + math.exp(-3))
    assert stats.entropy is not None
    assert stats.entropy[0].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_head_is_scale_then_softcap():
    hidden = torch.tensor([[2.0]], dtype=torch.float64)
    head = Head(torch.tensor([[3.0]]).double(), torch.tensor([1.0]).double(), 0.5, 2.0)
    assert logits(hidden, head).item() == pytest.approx(2 * math.tanh(0.5 * (2 * 3 + 1) / 2))


def test_every_field_against_a_loop_over_tokens(make_problem):
    p = make_problem()
    targets = p.targets.masked_fill(p.targets < 0, -1)
    stats = token_stats(p.hidden, Head(p.weight, p.bias, 0.7, 5.0), targets, True, True)
    assert stats.entropy is not None and stats.correct is not None
    for i, target in enumerate(targets.tolist()):
        raw = [
            0.7 * (sum(a * b for a, b in zip(p.hidden[i].tolist(), row, strict=True)) + b0)
            for row, b0 in zip(p.weight.tolist(), p.bias.tolist(), strict=True)
        ]
        z = [5 * math.tanh(value / 5) for value in raw]
        probability = [math.exp(value) / sum(map(math.exp, z)) for value in z]
        if target < 0:
            assert stats.loss[i] == 0 and stats.entropy[i] == 0 and not stats.correct[i]
            continue
        assert stats.loss[i].item() == pytest.approx(-math.log(probability[target]))
        assert stats.entropy[i].item() == pytest.approx(-sum(q * math.log(q) for q in probability))
        assert stats.correct[i].item() == (z.index(max(z)) == target)


def test_gradient_is_softmax_minus_onehot():
    hidden = torch.eye(3, dtype=torch.float64)[:1].requires_grad_()
    weight = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0.5, 0, 0]]).double().requires_grad_()
    head = Head(weight, None, 1.0, None)
    targets, token_weight = torch.tensor([2]), torch.tensor([-3.0]).double()
    weighted_sum(hidden, head, targets, token_weight).backward()
    expected = -3 * (torch.tensor([1.0, 2.0, 0.5]).double().softmax(0) - torch.tensor([0, 0, 1]))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:, 0], expected)
