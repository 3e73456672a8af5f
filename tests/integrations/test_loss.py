"""The loss of the adapters against float64; what a step divides by, against counting by hand."""

import pytest
import torch

from door_helpers import expected_gradients, gradients_of, make_model, make_rows, top
from slm.integrations.loss import SelectiveLoss, shifted
from slm.model.head import head_arguments

NAN = float("nan")


def batch_of(lengths: list[int], **fields: int):
    """One row for each length, padded at the right."""
    rows = make_rows(lengths, **fields)
    longest = max(lengths)

    def padded(name: str, value: float) -> torch.Tensor:
        return torch.tensor([r[name] + [value] * (longest - len(r["input_ids"])) for r in rows])

    return rows, padded("input_ids", 0), padded("labels", -100), padded("reference_logprob", NAN)


def test_entries_move_to_the_position_that_predicts_them():
    labels, scores = torch.tensor([[5, 6, -100]]), torch.tensor([[NAN, -1.0, -2.0]])
    targets, shifted_scores = shifted(labels, scores)
    assert targets.tolist() == [[6, -100, -100]]
    torch.testing.assert_close(shifted_scores, torch.tensor([[-1.0, -2.0, NAN]]), equal_nan=True)
    with pytest.raises(ValueError, match=r"shape \(1, 2\), the labels have \(1, 3\)"):
        shifted(labels, scores[:, :2])


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_gradients_are_those_of_the_definition(scope):
    rows, ids, labels, scores = batch_of([9, 5, 12], prompt=2, unscored=1)
    model = make_model()
    groups = [[row] for row in rows] if scope == "sequence" else [rows]
    expected, loss, count = expected_gradients(model, groups, 0.4)
    one = SelectiveLoss(0.4, scope)
    targets, moved = shifted(labels, scores)
    divisor = one.num_selected([(targets, moved)], lambda counts: counts)
    out = one(model.model(ids).last_hidden_state, head_arguments(model), targets, moved, divisor)
    out.loss.backward()
    assert divisor == count == out.selected.sum()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=2e-4, atol=1e-6)


def test_a_step_of_several_micro_batches_and_ranks_has_one_denominator():
    """Half of 3, 5 and 2, 2 candidates: 2 + 3 and 1 + 1, K rounding up at one half; two ranks."""
    t = torch.tensor
    first = (t([[1, 2, 3, -100, 4, -100]]), t([[-1.0, -1.0, -1.0, -1.0, NAN, NAN]]))
    second = (t([[1, 2, 3], [4, 5, -100]]), t([[-1.0, -1.0, -1.0], [-1.0, -1.0, NAN]]))

    def num(scope: str) -> int:
        return int(SelectiveLoss(0.5, scope).num_selected([first, second], lambda n: 2 * n))

    assert num("batch") == 2 * (2 + 3)
    assert num("sequence") == 2 * (2 + 2 + 1)
    assert num("global") == 3 + 5  # of 6 and of 10


def test_random_draws_as_many_candidates_without_looking_at_losses():
    _, ids, labels, scores = batch_of([9, 5, 12], prompt=2, unscored=3)
    model, one = make_model(), SelectiveLoss(0.4, "sequence", "random")
    targets, moved = shifted(labels, scores)
    hidden, drawn = model.model(ids).last_hidden_state.detach(), []
    candidates = (targets != -100) & ~moved.isnan()
    for seed in range(200):
        torch.manual_seed(seed)
        drawn.append(one(hidden, head_arguments(model), targets, moved, 1.0).selected)
    counts = torch.stack(drawn).sum(0)
    expected = [top(torch.zeros(int(row.sum())), 0.4).sum().item() for row in candidates]
    assert all(one.sum(-1).tolist() == expected for one in drawn)
    assert (counts[~candidates] == 0).all() and (counts[candidates] > 30).all()


def test_nothing_to_select_is_zero_with_zero_gradients():
    _, ids, labels, scores = batch_of([4, 4])
    model, one = make_model(), SelectiveLoss(0.4)
    targets, moved = shifted(labels, torch.full_like(scores, NAN))
    divisor = one.num_selected([(targets, moved)], lambda counts: counts)
    hidden = model.model(ids).last_hidden_state
    one(hidden, head_arguments(model), targets, moved, divisor).loss.backward()
    assert divisor == 0 and all((g == 0).all() for g in gradients_of(model).values())


def test_probabilities_and_positive_numbers_are_no_scores():
    with pytest.raises(ValueError, match="reference_logprob holds 0.25, it must be a natural log"):
        SelectiveLoss(0.5).num_selected(
            [(torch.tensor([[1, 2]]), torch.tensor([[-1.0, 0.25]]))], lambda counts: counts
        )
