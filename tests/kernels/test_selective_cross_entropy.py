"""The public losses against loops over tokens, and against the bugs of earlier implementations."""

import logging
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from slm_kernels import (
    select_top_k,
    selective_cross_entropy,
    selective_cross_entropy_from_logits,
    token_cross_entropy,
    weighted_cross_entropy,
    weighted_cross_entropy_from_logits,
)
from slm_kernels.ops import say_once

IMPLEMENTATIONS = ["reference", "chunked"]


def by_hand(problem, ratio):
    """Token losses, excess and the K best of a batch, in float64 and plain Python."""
    z = problem.hidden.detach().double() @ problem.weight.detach().double().T
    loss, excess = [], {}
    for i, target in enumerate(problem.targets.tolist()):
        loss.append((z[i].logsumexp(0) - z[i, target]).item() if target != -100 else 0.0)
        reference = problem.reference_loss[i].item()
        if target != -100 and not math.isnan(reference):
            excess[i] = loss[i] - reference
    count = min(max(math.floor(ratio * len(excess) + 0.5), 1), len(excess))
    return loss, excess, sorted(excess, key=lambda i: -excess[i])[:count]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.6, 1.0])
def test_every_field_against_plain_python(make_problem, implementation, ratio):
    p = make_problem()
    p.reference_loss[::6] = math.nan
    out = selective_cross_entropy(
        p.hidden,
        p.weight,
        p.targets,
        p.reference_loss,
        select_ratio=ratio,
        implementation=implementation,
    )
    loss, excess, best = by_hand(p, ratio)
    assert out.selected.nonzero().squeeze(1).tolist() == sorted(best)
    assert out.loss.item() == pytest.approx(sum(loss[i] for i in best) / len(best))
    torch.testing.assert_close(out.token_loss, torch.tensor(loss).double(), rtol=1e-5, atol=1e-6)
    assert [i for i in range(37) if not out.excess_loss[i].isnan()] == sorted(excess)
    assert all(out.excess_loss[i].item() == pytest.approx(excess[i]) for i in excess)
    assert out.threshold.item() == pytest.approx(min(excess[i] for i in best))
    assert out.num_selected == len(best)
    assert out.num_candidates == len(excess) < out.num_valid
    assert out.num_valid == (p.targets != -100).sum()
    assert out.loss.requires_grad and not out.token_loss.requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_autograd_with_the_mask_held_fixed(make_problem, implementation):
    p = make_problem()
    out = selective_cross_entropy(
        p.hidden,
        p.weight,
        p.targets,
        p.reference_loss,
        select_ratio=0.5,
        bias=p.bias,
        softcap=3.0,
        logit_scale=0.8,
        implementation=implementation,
    )
    ours = torch.autograd.grad(out.loss, (p.hidden, p.weight, p.bias))
    z = 3 * torch.tanh(0.8 * F.linear(p.hidden, p.weight, p.bias) / 3)
    loss = F.cross_entropy(z[out.selected], p.targets[out.selected])
    theirs = torch.autograd.grad(loss, (p.hidden, p.weight, p.bias))
    torch.testing.assert_close(out.loss, loss)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert (ours[0][~out.selected] == 0).all()


def test_gradcheck_where_no_step_changes_the_mask(make_problem):
    p = make_problem(num_tokens=9, width=3, vocab_size=6)
    reference_loss = torch.arange(9).float() * 100  # far apart: the order cannot change

    def loss(hidden, weight):
        return selective_cross_entropy(
            hidden, weight, p.targets, reference_loss, select_ratio=0.5
        ).loss

    assert torch.autograd.gradcheck(loss, (p.hidden, p.weight))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batches_of_sequences(make_problem, implementation):
    p = make_problem(num_tokens=36)
    p.targets[:6] = -100  # rows of unequal size
    hidden, targets = p.hidden.view(3, 12, 7), p.targets.view(3, 12)
    reference_loss = p.reference_loss.view(3, 12)
    out = selective_cross_entropy(
        hidden,
        p.weight,
        targets,
        reference_loss,
        select_ratio=0.4,
        scope="sequence",
        implementation=implementation,
    )
    flat = selective_cross_entropy(
        p.hidden, p.weight, p.targets, p.reference_loss, select_ratio=0.4
    )
    torch.testing.assert_close(out.token_loss.flatten(), flat.token_loss)
    rows = [select_top_k(out.excess_loss[i], targets[i] != -100, 0.4).tolist() for i in range(3)]
    assert out.selected.tolist() == rows
    # Divided once, by everything that was selected: a mean of the rows' means is another number.
    assert out.loss.item() == pytest.approx(out.token_loss[out.selected].mean().item())
    counts = out.selected.sum(1)
    assert len(set(counts.tolist())) > 1
    means = (out.token_loss * out.selected).sum(1) / counts
    assert abs(out.loss.item() - means.mean().item()) > 1e-6
    lowest = [out.excess_loss[i][out.selected[i]].min().item() for i in range(3)]
    assert out.threshold.tolist() == lowest


def test_denominator_is_the_number_selected_not_of_tokens():
    # Four equal words, eight tokens, half selected: the mean is log 4, not half of it.
    out = selective_cross_entropy(
        torch.ones(8, 1),
        torch.zeros(4, 1),
        torch.zeros(8).long(),
        torch.zeros(8),
        select_ratio=0.5,
    )
    assert out.loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert out.selected.tolist() == [True] * 4 + [False] * 4


def test_loss_is_normalized_not_a_raw_logit():
    # Adding a constant to every logit changes no probability.
    hidden, weight = torch.eye(3), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    targets, zero = torch.tensor([0, 1, 2]), torch.zeros(3)
    plain, shifted = (
        selective_cross_entropy(
            hidden, weight, targets, zero, select_ratio=0.67, bias=torch.full((5,), shift)
        )
        for shift in (0.0, 7.0)
    )
    torch.testing.assert_close(plain.token_loss, shifted.token_loss)
    assert torch.equal(plain.selected, shifted.selected)


def test_polarity_high_excess_is_selected():
    # Equal token losses: the token the reference finds easiest has the most left to learn.
    out = selective_cross_entropy(
        torch.ones(3, 1),
        torch.zeros(4, 1),
        torch.zeros(3).long(),
        torch.tensor([1.3, 0.1, 0.9]),
        select_ratio=0.34,
    )
    assert out.selected.tolist() == [False, True, False]


def test_target_equal_to_reference_still_selects_exactly_k(make_problem):
    p = make_problem(num_tokens=30, ignored=0.0, dtype=torch.float32)
    reference_loss = token_cross_entropy(p.hidden, p.weight, p.targets).loss
    out = selective_cross_entropy(p.hidden, p.weight, p.targets, reference_loss, select_ratio=0.6)
    assert out.selected.tolist() == [True] * 18 + [False] * 12
    assert out.threshold == 0


def test_padding_is_neither_candidate_nor_counted(make_problem):
    p = make_problem()
    hole = p.targets == -100
    p.reference_loss[~hole] += 50  # padding would have by far the highest excess
    out = selective_cross_entropy(p.hidden, p.weight, p.targets, p.reference_loss, select_ratio=0.5)
    assert not out.selected[hole].any() and (out.token_loss[hole] == 0).all()
    assert out.num_selected == math.floor(0.5 * (~hole).sum().item() + 0.5)
    other = selective_cross_entropy(
        p.hidden,
        p.weight,
        p.targets.masked_fill(hole, 3_000),
        p.reference_loss,
        select_ratio=0.5,
        ignore_index=3_000,
    )
    assert torch.equal(other.loss, out.loss)


def test_reference_loss_of_padding_may_be_anything(make_problem):
    p = make_problem()
    p.reference_loss[p.targets == -100] = -1.0
    out = selective_cross_entropy(p.hidden, p.weight, p.targets, p.reference_loss, select_ratio=1.0)
    assert out.num_selected == (p.targets != -100).sum()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("nothing", ["all ignored", "no reference", "no token"])
@pytest.mark.parametrize("denominator", [None, 5.0, 0.0])
def test_no_candidate(make_problem, implementation, nothing, denominator):
    p = make_problem(num_tokens=0 if nothing == "no token" else 6)
    targets = p.targets.fill_(-100) if nothing == "all ignored" else p.targets
    reference_loss = p.reference_loss.fill_(math.nan)
    out = selective_cross_entropy(
        p.hidden,
        p.weight,
        targets,
        reference_loss,
        select_ratio=0.5,
        denominator=denominator,
        implementation=implementation,
    )
    grads = torch.autograd.grad(out.loss, (p.hidden, p.weight))
    assert out.loss == 0 and out.num_selected == 0 and not out.selected.any()
    assert out.threshold == math.inf
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("has_reference", [True, False])
def test_a_broken_model_is_not_hidden(make_problem, implementation, value, has_reference):
    p = make_problem(ignored=0.0)
    p.reference_loss[4] = 1000.0 if has_reference else math.nan
    hidden = p.hidden.detach().clone()
    hidden[4] = value
    out = selective_cross_entropy(
        hidden,
        p.weight,
        p.targets,
        p.reference_loss,
        select_ratio=0.1,
        implementation=implementation,
    )
    assert not out.loss.isfinite()


def test_explicit_denominator_makes_micro_batches_add_up(make_problem):
    p = make_problem(num_tokens=36)
    arguments = {"select_ratio": 0.5, "scope": "sequence"}
    shaped = (p.hidden.view(4, 9, 7), p.targets.view(4, 9), p.reference_loss.view(4, 9))
    whole = selective_cross_entropy(shaped[0], p.weight, *shaped[1:], **arguments)
    expected = torch.autograd.grad(whole.loss, p.weight)[0]
    total = torch.zeros_like(expected)
    for part, denominator in (
        (slice(0, 1), int(whole.num_selected)),
        (slice(1, 4), whole.num_selected),
    ):
        hidden, targets, reference_loss = (tensor[part] for tensor in shaped)
        loss = selective_cross_entropy(
            hidden, p.weight, targets, reference_loss, denominator=denominator, **arguments
        ).loss
        total += torch.autograd.grad(loss, p.weight)[0]
    torch.testing.assert_close(total, expected)


def test_float32_scores_of_bfloat16_operands(make_problem):
    p = make_problem(num_tokens=300, width=32, vocab_size=64, dtype=torch.bfloat16, ignored=0.1)
    out = selective_cross_entropy(p.hidden, p.weight, p.targets, p.reference_loss, select_ratio=0.6)
    _, _, best = by_hand(p, 0.6)
    assert out.selected.nonzero().squeeze(1).tolist() == sorted(best)
    assert out.token_loss.dtype == out.loss.dtype == torch.float32
    grad = torch.autograd.grad(out.loss, p.hidden)[0]
    assert grad.dtype == torch.bfloat16 and (grad[~out.selected] == 0).all()


@pytest.mark.parametrize(
    ("implementation", "backward_inside"),
    [("reference", False), ("chunked", False), ("chunked", True)],
)
def test_autocast_casts_operands_and_keeps_float32(make_problem, implementation, backward_inside):
    p = make_problem(num_tokens=60, width=32, dtype=torch.float32)
    arguments = {"select_ratio": 0.6, "implementation": implementation}
    with torch.autocast("cpu", torch.bfloat16):
        out = selective_cross_entropy(
            p.hidden.bfloat16(), p.weight, p.targets, p.reference_loss, **arguments
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        grad = torch.autograd.grad(out.loss, p.weight)[0]
    cast = selective_cross_entropy(
        p.hidden.bfloat16(), p.weight.bfloat16(), p.targets, p.reference_loss, **arguments
    )
    expected = torch.autograd.grad(cast.loss, p.weight)[0]
    assert torch.equal(out.token_loss, cast.token_loss) and out.token_loss.dtype == torch.float32
    assert torch.equal(out.selected, cast.selected)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected)


def test_autocast_leaves_float64_alone(make_problem):
    p = make_problem()
    with torch.autocast("cpu", torch.bfloat16):
        inside = selective_cross_entropy(
            p.hidden, p.weight, p.targets, p.reference_loss, select_ratio=0.6
        )
    outside = selective_cross_entropy(
        p.hidden, p.weight, p.targets, p.reference_loss, select_ratio=0.6
    )
    assert torch.equal(inside.loss, outside.loss) and inside.loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_from_logits_is_the_identity_head(make_problem, dtype):
    p = make_problem(num_tokens=36)
    logits = (p.hidden @ p.weight.T).detach().to(dtype).view(4, 9, 29).requires_grad_()
    shaped = (p.targets.view(4, 9), p.reference_loss.view(4, 9))
    for scope in ("batch", "sequence"):
        ours = selective_cross_entropy_from_logits(logits, *shaped, select_ratio=0.5, scope=scope)
        eye = torch.eye(29, dtype=dtype)
        theirs = selective_cross_entropy(
            logits, eye, *shaped, select_ratio=0.5, scope=scope, implementation="reference"
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        grad, expected = (torch.autograd.grad(out.loss, logits)[0] for out in (ours, theirs))
        torch.testing.assert_close(grad, expected)
        assert (grad[~ours.selected] == 0).all()


def test_weighted_mean_against_a_loop(make_problem):
    p = make_problem()
    token_weight = p.token_weight.abs()
    z = p.hidden @ p.weight.T
    terms = [
        (token_weight[i] * F.cross_entropy(z[i], p.targets[i]), token_weight[i])
        for i in range(37)
        if p.targets[i] != -100
    ]
    expected = torch.stack([a for a, _ in terms]).sum() / torch.stack([b for _, b in terms]).sum()
    loss = weighted_cross_entropy(p.hidden, p.weight, p.targets, token_weight).loss
    torch.testing.assert_close(loss, expected)


def test_weights_get_no_gradient_and_masks_are_weights(make_problem):
    p = make_problem()
    token_weight = p.token_weight.abs().requires_grad_()
    weighted_cross_entropy(p.hidden, p.weight, p.targets, token_weight).loss.backward()
    assert token_weight.grad is None
    mask = torch.arange(37) % 2 == 0
    chosen = mask & (p.targets != -100)
    loss = weighted_cross_entropy(p.hidden, p.weight, p.targets, mask).loss
    expected = F.cross_entropy((p.hidden @ p.weight.T)[chosen], p.targets[chosen])
    torch.testing.assert_close(loss, expected)


def test_weight_of_an_ignored_token_counts_for_nothing(make_problem):
    p = make_problem()
    weights = [
        torch.ones(37).masked_fill(p.targets == -100, value) for value in (0.0, 9.0, math.nan)
    ]
    losses = [
        weighted_cross_entropy(p.hidden, p.weight, p.targets, weight).loss for weight in weights
    ]
    assert losses[0] == losses[1] == losses[2]


def test_no_weight_at_all_is_zero_loss(make_problem):
    p = make_problem()
    loss = weighted_cross_entropy(p.hidden, p.weight, p.targets, torch.zeros(37)).loss
    grads = torch.autograd.grad(loss, (p.hidden, p.weight))
    assert loss == 0 and all((grad == 0).all() for grad in grads)


def test_weights_made_of_the_losses_are_those_weights(make_problem):
    p = make_problem()
    given = []

    def make(token_loss):
        given.append(token_loss)
        return torch.sigmoid(token_loss - p.reference_loss)

    out = weighted_cross_entropy(p.hidden, p.weight, p.targets, make)
    z = p.hidden @ p.weight.T
    token_loss = F.cross_entropy(z, p.targets, reduction="none")
    torch.testing.assert_close(given[0], token_loss.detach())
    token_weight = torch.sigmoid(token_loss - p.reference_loss).detach()
    token_weight = token_weight * (p.targets != -100)
    torch.testing.assert_close(out.token_weight, token_weight)
    torch.testing.assert_close(out.token_loss, token_loss.detach())
    expected = (token_weight * token_loss).sum() / token_weight.sum()
    torch.testing.assert_close(out.loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.loss, (p.hidden, p.weight)),
        torch.autograd.grad(expected, (p.hidden, p.weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_weights_that_cancel_are_not_hidden(make_problem):
    p = make_problem(num_tokens=2, ignored=0.0)
    loss = weighted_cross_entropy(p.hidden, p.weight, p.targets, torch.tensor([1.0, -1.0])).loss
    assert not loss.isfinite()


def test_negative_reference_loss_is_a_log_probability_by_mistake(make_problem):
    p = make_problem()
    with pytest.raises(ValueError, match="pass -reference_logprob"):
        selective_cross_entropy(p.hidden, p.weight, p.targets, -p.reference_loss, select_ratio=0.5)


MISTAKES = [
    ({"select_ratio": 1.5}, "got 1.5"),
    ({"scope": "rank"}, "sequence, batch, global, got 'rank'"),
    ({"scope": "global"}, "got group=None"),
    ({"implementation": "cuda"}, "auto, reference, chunked, triton, got 'cuda'"),
    ({"denominator": -1.0}, "got -1.0"),
    ({"denominator": torch.ones(2)}, r"0-d tensor, got \(2,\)"),
    ({"softcap": 0.0}, "got 0.0"),
    ({"logit_scale": math.inf}, "got inf"),
    ({"hidden": torch.zeros(5, 4)}, r"\(5, 4\) and \(6, 3\)"),
    ({"weight": torch.zeros(6, 3).double()}, "torch.float32 and torch.float64"),
    ({"weight": torch.zeros(6, 3, device="meta")}, "cpu and meta"),
    ({"bias": torch.zeros(5)}, r"\(6,\), got \(5,\)"),
    ({"bias": torch.zeros(6).half()}, "torch.float32 and torch.float16"),
    ({"targets": torch.zeros(4).long()}, r"\(5,\), got \(4,\)"),
    ({"targets": torch.zeros(5).int()}, "int64, got torch.int32"),
    ({"targets": torch.tensor([0, 1, 6, 2, -1])}, r"\[0, 6\).* got 2 others, the first 6"),
    ({"reference_loss": torch.zeros(5, 1)}, r"\(5,\) as targets, got \(5, 1\)"),
    ({"reference_loss": torch.zeros(5).bfloat16()}, "got torch.bfloat16"),
    ({"reference_loss": torch.zeros(5, device="meta")}, "meta and cpu"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_are_named(change, message):
    arguments = {
        "hidden": torch.zeros(5, 3),
        "weight": torch.zeros(6, 3),
        "targets": torch.zeros(5).long(),
        "reference_loss": torch.zeros(5),
        "select_ratio": 0.5,
    } | change
    with pytest.raises(ValueError, match=message):
        selective_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("token_weight", "message"),
    [
        (torch.ones(4), r"\(5,\) as targets, got \(4,\)"),
        (torch.ones(5).long(), "torch.int64"),
        (lambda token_loss: token_loss[:4], r"\(5,\) as targets, got \(4,\)"),
        (lambda token_loss: 1.0, "make a tensor, got 1.0"),
        (None, "make a tensor, got None"),
    ],
)
def test_weight_mistakes_are_named(token_weight, message):
    with pytest.raises(ValueError, match=message):
        weighted_cross_entropy(
            torch.zeros(5, 3), torch.zeros(6, 3), torch.zeros(5).long(), token_weight
        )


@pytest.mark.parametrize(
    ("logits", "message"), [(torch.zeros(5), r"\(5,\)"), (torch.zeros(5, 3).int(), "torch.int32")]
)
def test_logit_mistakes_are_named(logits, message):
    with pytest.raises(ValueError, match=message):
        selective_cross_entropy_from_logits(
            logits, torch.zeros(5).long(), torch.zeros(5), select_ratio=0.5
        )


def test_which_implementation_runs_is_said_once(make_problem, caplog):
    say_once.cache_clear()
    p = make_problem()
    with caplog.at_level(logging.INFO, logger="slm_kernels"):
        for _ in range(2):
            token_cross_entropy(p.hidden, p.weight, p.targets)
    assert [record.getMessage() for record in caplog.records] == [
        "cross-entropy on cpu runs the implementation 'chunked'"
    ]


def tied_problem():
    """Ties across ranks: two kinds of token, dealt out unevenly; some holes."""
    hidden = torch.tensor([[0.0], [1.0]], dtype=torch.float64)[torch.arange(12) % 2]
    weight = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    targets = torch.tensor([0, 0, 0, 4, 0, 0, -100, 0, 0, 4, 0, 0])
    reference_loss = torch.zeros(12)
    reference_loss[5] = math.nan
    return hidden, weight, targets, reference_loss


def loss_on_a_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    hidden, weight, targets, reference_loss = tied_problem()
    mine = slice(*{2: ((0, 5), (5, 12)), 4: ((0, 2), (2, 3), (3, 9), (9, 12))}[world][rank])
    for scope in ("global", "batch"):
        leaf = weight.clone().requires_grad_()
        out = selective_cross_entropy(
            hidden[mine],
            leaf,
            targets[mine],
            reference_loss[mine],
            select_ratio=0.5,
            scope=scope,
            group=dist.group.WORLD,
        )
        out.loss.backward()
        assert leaf.grad is not None
        dist.all_reduce(leaf.grad)
        selected = torch.zeros(12, dtype=torch.int64)
        selected[mine] = out.selected.long()
        dist.all_reduce(selected)
        selected = selected.bool()
        whole = weight.clone().requires_grad_()
        if scope == "global":
            one = selective_cross_entropy(hidden, whole, targets, reference_loss, select_ratio=0.5)
            assert torch.equal(selected, one.selected)
            assert torch.equal(out.threshold, one.threshold)
        # The average over ranks, as a data-parallel wrapper takes it, is the mean over everything.
        F.cross_entropy((hidden @ whole.T)[selected], targets[selected]).backward()
        torch.testing.assert_close(leaf.grad / world, whole.grad)
        given = selective_cross_entropy(
            hidden[mine],
            weight,
            targets[mine],
            reference_loss[mine],
            select_ratio=0.5,
            scope=scope,
            group=dist.group.WORLD,
            denominator=2.0,
        )
        torch.testing.assert_close(given.loss, out.token_loss[out.selected].sum() / 2)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_group_is_one_process_on_everything(world, tmp_path, run_on_ranks):
    run_on_ranks(loss_on_a_rank, world, tmp_path)


@pytest.mark.parametrize("way", ["reference", "chunked", "from_logits"])
def test_weights_made_of_the_entropies(make_problem, way):
    p, given = make_problem(), []

    def make(token_loss, entropy):
        given.append((token_loss, entropy))
        return entropy

    z = (p.hidden @ p.weight.T).detach()
    if way == "from_logits":
        out = weighted_cross_entropy_from_logits(z, p.targets, make, want_entropy=True)
    else:
        operands = (p.hidden, p.weight, p.targets)
        out = weighted_cross_entropy(*operands, make, want_entropy=True, implementation=way)
    valid = p.targets != -100
    entropy = torch.special.entr(z.softmax(-1)).sum(-1) * valid
    token_loss = F.cross_entropy(z, p.targets, reduction="none")
    torch.testing.assert_close(given, [(token_loss, entropy)])
    torch.testing.assert_close(out.entropy, entropy)
    torch.testing.assert_close(out.loss, (entropy * token_loss).sum() / entropy.sum())
    ones = torch.ones(37)  # known before the forward pass, which still gives them
    again = weighted_cross_entropy(p.hidden, p.weight, p.targets, ones, want_entropy=True)
    torch.testing.assert_close(again.entropy, entropy)
    torch.testing.assert_close(again.loss, token_loss.sum() / valid.sum())
    plain = weighted_cross_entropy(p.hidden, p.weight, p.targets, ones)
    assert plain.entropy is None and torch.equal(plain.loss, again.loss)
