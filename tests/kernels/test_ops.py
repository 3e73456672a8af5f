"""The losses inside compiled, checkpointed and sharded models."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernel_helpers import device_of
from slm_kernels import (
    selective_cross_entropy,
    selective_cross_entropy_from_logits,
    token_cross_entropy,
    weighted_cross_entropy,
)


class Model(nn.Module):
    """A head on a layer, with the loss inside."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 29)
        self.implementation = implementation

    def forward(self, x: Tensor, targets: Tensor, reference_loss: Tensor, **options) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        out = selective_cross_entropy(
            hidden,
            self.head.weight,
            targets,
            reference_loss,
            bias=self.head.bias,
            softcap=5.0,
            implementation=self.implementation,
            **options,
        )
        return out.loss + out.token_loss.sum() * 0 + out.num_selected * 0


def inputs(implementation: str = "chunked") -> tuple[Tensor, Tensor, Tensor]:
    device = device_of(implementation)
    random = torch.Generator().manual_seed(1)
    targets = torch.randint(29, (3, 8), generator=random)
    targets[0, :3] = -100
    reference_loss = torch.rand(3, 8, generator=random) * 4
    x = torch.randn(3, 8, 6, generator=random)
    return x.to(device), targets.to(device), reference_loss.to(device)


def step(model: Any, *arguments: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(*arguments, **options)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


CASES = [
    {"select_ratio": 0.4},
    {"select_ratio": 0.4, "scope": "sequence", "logits_cache_bytes": 10**6},
    {"select_ratio": 1.0, "denominator": 7.0},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_compiled_model_is_one_graph_with_the_same_gradients(implementation, options):
    model = Model(implementation).to(device_of(implementation))
    expected_loss, expected = step(model, *inputs(implementation), **options)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    loss, grads = step(compiled, *inputs(implementation), **options)
    torch.testing.assert_close(loss, expected_loss)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_by_inductor():
    model = Model("chunked")
    expected_loss, expected = step(model, *inputs(), select_ratio=0.4)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    loss, grads = step(compiled, *inputs(), select_ratio=0.4)
    torch.testing.assert_close(loss, expected_loss)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_made_in_the_forward_pass_are_scaled_once():
    """No zeros for the operator's other outputs, which are as large as the gradients."""
    weight = torch.randn(29, 6, requires_grad=True)
    x, targets, _ = inputs()
    loss = weighted_cross_entropy(x, weight, targets, torch.ones(3, 8)).loss
    with LargeTensors(weight.numel()) as made:
        loss.backward()
    assert made.operators == ["aten.mul.Tensor", "aten.detach.default"]  # the second is a view


class LargeTensors(TorchDispatchMode):
    """The operators that return a tensor of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.size:
            self.operators.append(str(func))
        return out


def test_every_public_loss_compiles_in_one_graph():
    x, targets, reference_loss = inputs()
    weight = torch.randn(29, 6)

    def everything(x: Tensor) -> tuple[Tensor, ...]:
        scores = token_cross_entropy(x, weight, targets, want_entropy=True)
        mean = weighted_cross_entropy(x, weight, targets, reference_loss, max_rows=24).loss
        made = weighted_cross_entropy(x, weight, targets, lambda losses: losses > reference_loss)
        out = selective_cross_entropy_from_logits(
            x @ weight.T, targets, reference_loss, select_ratio=0.5
        )
        assert scores.entropy is not None
        return scores.loss, scores.entropy, scores.correct, mean, made.loss, out.loss, out.selected

    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), everything(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mistakes_in_values_are_found_in_a_compiled_model():
    x, targets, reference_loss = inputs()
    torch.compiler.reset()
    compiled = torch.compile(Model("chunked"), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="reference_loss must be >= 0"):
        compiled(x, targets, -1 - reference_loss, select_ratio=0.5)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 29\)"):
        compiled(x, targets + 29, reference_loss, select_ratio=0.5)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_activation_checkpointing_changes_nothing(implementation):
    model = Model(implementation).to(device_of(implementation))
    expected_loss, expected = step(model, *inputs(implementation), select_ratio=0.4)
    model.zero_grad()
    loss = checkpoint(model, *inputs(implementation), select_ratio=0.4, use_reentrant=False)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert torch.equal(loss.detach(), expected_loss)
    for p, theirs in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None and torch.equal(p.grad, theirs)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_operators_pass_torchs_own_checks(make_problem, implementation):
    """Schema, fake outputs and autograd registration of every operator."""
    p = make_problem(num_tokens=9, width=3, vocab_size=11, dtype=torch.float32)
    device = device_of(implementation)
    leaves = (p.hidden, p.weight, p.bias)
    leaves = tuple(leaf.detach().to(device).requires_grad_() for leaf in leaves)
    operands = (*leaves, p.targets.masked_fill(p.targets < 0, -1).to(device))
    found = torch.ops.slm_kernels.token_stats(*operands, 0.7, None, True, True, 700, implementation)
    per_token = (p.token_weight.float().to(device), *found[:3], *found[5:])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    tail = (0.7, None, -1)
    torch.library.opcheck(
        torch.ops.slm_kernels.token_stats.default,
        tuple(t.detach() for t in operands) + (0.7, None, True, True, 700, implementation),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.slm_kernels.weighted_sum.default,
        (*operands, *per_token, *tail, implementation),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.slm_kernels.head_gradients.default,
        (
            torch.tensor(2.0, device=device),
            *(t.detach() for t in operands),
            *per_token,
            *tail,
            [True] * 3,
        )
        + (implementation,),
        test_utils=checks,
    )


# ---- a weight that is sharded ---------------------------------------------------------------


def sharded_head(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    x, targets, reference_loss = inputs()
    model = Model("chunked")
    expected = model(x, targets, reference_loss, select_ratio=0.5, scope="sequence")
    expected.backward()
    head = copy.deepcopy(model.head)
    head.zero_grad()
    hidden = torch.tanh(model.layer(x)).detach()
    fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
    mine = slice(rank, rank + 1) if rank + 1 < world else slice(rank, 3)
    for _ in range(2):  # outside the wrapped module's forward, its parameters are sharded
        head.zero_grad()
        out = selective_cross_entropy(
            hidden[mine],
            head.weight,
            targets[mine],
            reference_loss[mine],
            select_ratio=0.5,
            scope="sequence",
            group=dist.group.WORLD,
            bias=head.bias,
            softcap=5.0,
        )
        out.loss.backward()
    for ours, theirs in zip(head.parameters(), model.head.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor) and theirs.grad is not None
        assert ours.grad.placements == ours.placements  # type: ignore[attr-defined]
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_head_gets_a_sharded_gradient(tmp_path, run_on_ranks):
    run_on_ranks(sharded_head, 2, tmp_path)
