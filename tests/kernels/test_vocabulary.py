"""A head that is cut over ranks, against the whole one in plain torch on one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from slm_kernels import selective_cross_entropy, token_cross_entropy, weighted_cross_entropy

CUTS = {2: (0, 11, 29), 4: (0, 1, 12, 20, 29)}
CAP, SCALE = 7.0, 1.5


def problem():
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    hidden, weight, bias = normal(5, 6, 7), normal(29, 7), normal(29)
    weight[20], bias[20] = weight[3], bias[3]  # two equal logits: the target must be the first
    targets = torch.randint(29, (5, 6), generator=random)
    z = CAP * torch.tanh(SCALE * (hidden @ weight.T + bias) / CAP)
    targets[0] = z.argmax(-1)[0]
    targets[1, 0], hidden[1, 0] = 20, 9 * weight[3]
    targets[2, ::2] = -100
    return hidden, weight, bias, targets, normal(5, 6).abs()


def check_on_a_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    hidden, weight, bias, targets, reference_loss = problem()
    z = CAP * torch.tanh(SCALE * (hidden @ weight.T + bias) / CAP)
    valid = targets != -100
    losses = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(5, 6)
    entropy = torch.special.entr(z.softmax(-1)).sum(-1) * valid
    mine = slice(*CUTS[world][rank : rank + 2])
    head = {"bias": bias[mine], "logit_scale": SCALE, "softcap": CAP}
    group = {"vocab_group": dist.group.WORLD}

    scored = token_cross_entropy(hidden, weight[mine], targets, want_entropy=True, **head, **group)
    torch.testing.assert_close(scored.loss, losses)
    torch.testing.assert_close(scored.entropy, entropy)
    torch.testing.assert_close(scored.lse, torch.logsumexp(z, -1) * valid)
    first = (z == z.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    assert torch.equal(scored.correct, (first == targets) & valid)
    assert scored.correct.any() and not scored.correct[1, 0]

    chosen = (losses - reference_loss).flatten().masked_fill(~valid.flatten(), -torch.inf)
    selected = torch.zeros(30, dtype=torch.bool)
    selected[chosen.argsort(descending=True)[: (int(valid.sum()) + 1) // 2]] = True
    leaves = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
    out = selective_cross_entropy(
        *leaves, targets, reference_loss, select_ratio=0.5, **head, **group
    )
    assert torch.equal(out.selected.flatten(), selected)
    known = weighted_cross_entropy(*leaves, targets, out.selected, **head, **group)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = CAP * torch.tanh(SCALE * (whole[0] @ whole[1].T + bias) / CAP)
    expected = F.cross_entropy(exact.flatten(0, 1)[selected], targets.flatten()[selected])
    wanted = torch.autograd.grad(expected, whole)
    for loss in (out.loss, known.loss):
        torch.testing.assert_close(loss, expected.detach(), check_stride=False)
        found = torch.autograd.grad(loss, leaves)
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1][mine])
    dist.destroy_process_group()


def check_dtensors_on_a_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    hidden, weight, _, targets, _ = problem()
    mesh = init_device_mesh("cpu", (world,))
    cut = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    ones = torch.ones(5, 6)
    out = weighted_cross_entropy(hidden, cut, targets, ones, vocab_group=mesh.get_group())
    out.loss.backward()
    whole = weight.clone().requires_grad_()
    F.cross_entropy((hidden @ whole.T).flatten(0, 1), targets.flatten()).backward()
    gradient: Any = cut.grad
    torch.testing.assert_close(gradient.full_tensor(), whole.grad)
    other = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"cut over its rows, got \(Shard\(dim=1\),\)"):
        token_cross_entropy(hidden, other, targets, vocab_group=mesh.get_group())
    with pytest.raises(ValueError, match="implementation is chunked, got 'reference'"):
        token_cross_entropy(
            hidden, cut, targets, vocab_group=mesh.get_group(), implementation="reference"
        )
    with pytest.raises(ValueError, match=r"must lie in \[0, 29\)"):
        token_cross_entropy(hidden, cut, targets + 29, vocab_group=mesh.get_group())
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_head_cut_over_ranks_is_the_whole_head(world, tmp_path, run_on_ranks):
    run_on_ranks(check_on_a_rank, world, tmp_path)


@pytest.mark.slow
def test_dtensors_are_cut_over_their_rows(tmp_path, run_on_ranks):
    run_on_ranks(check_dtensors_on_a_rank, 2, tmp_path)
