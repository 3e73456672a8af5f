"""The cut gradient against its definition: keys and values of unselected positions detached."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import warm
from model_helpers import LENGTH, make_batch, make_lm
from slm.errors import UserError
from slm.model.attention import attention_through
from slm.model.build import SelectiveLM, check_model
from slm.model.head import hidden_states
from slm.model.selected import check_rows, rows_of, selected_backward
from slm.store.windows import IGNORE_INDEX, Batch

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama tied", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),  # a sliding window
    "gemma2": ("gemma2", {}),  # a soft cap in attention
    "gemma3": ("gemma2", {"model_type": "gemma3_text", "final_logit_softcapping": None}),
    "phi3": ("llama", {"model_type": "phi3"}),
    "olmo2": ("llama", {"model_type": "olmo2"}),
    "smollm3": ("llama", {"model_type": "smollm3"}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("llama", {"model_type": "mixtral", "num_local_experts": 4}),
}


FLOAT32 = ("mixtral",)  # its experts know no other


def kind(name: str, **fields: Any) -> SelectiveLM:
    base, more = KINDS[name]
    lm = make_lm(base, **(more | fields))
    if name not in FLOAT32:
        lm = lm.double()
    lm.backward = "selected"
    return lm


def some(batch: Batch) -> Tensor:  # (B, T) bool: a third of one window, two thirds of the other
    index = torch.arange(LENGTH) % 3
    chosen = torch.stack([index == 1, index != 1])
    return chosen & (batch["targets"] != IGNORE_INDEX)


def gradients(lm: SelectiveLM, loss: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def by_definition(lm: SelectiveLM, batch: Batch, selected: Tensor) -> Tensor:
    """The loss, whose gradient plain autograd makes."""
    kept = selected[:, None, :, None]

    def cut(own: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs):
        key, value = (torch.where(kept, one, one.detach()) for one in (key, value))
        return own(module, query, key, value, *args, **kwargs)

    with attention_through(cut):
        return lm(batch, selected, takes_all=True).loss


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = tolerance * gradient.norm().clamp(min=1e-3)
        assert (found[name] - gradient).norm() <= limit, name


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_the_definitions(name, documents, recomputes):
    lm, batch = kind(name), make_batch(documents=documents)
    selected = some(batch)
    loss = by_definition(lm, batch, selected)
    expected = gradients(lm, loss)
    if recomputes:
        lm.model.activation_checkpointing_enable()
    output = lm(batch, lambda _: selected)
    assert torch.equal(output.loss, loss)
    rounds = name in ("gemma2", "gemma3", *FLOAT32)  # parts of it are computed in float32
    assert_same(gradients(lm, output.loss), expected, 1e-5 if rounds else 1e-12)


def test_the_cut_is_another_gradient_than_the_exact_one():
    lm, batch = kind("llama"), make_batch()
    cut, exact = (
        gradients(lm, lm(batch, some(batch), takes_all=word).loss) for word in (False, True)
    )
    first = "model.model.layers.0.self_attn.v_proj.weight"
    assert (cut[first] - exact[first]).norm() > 0.05 * exact[first].norm()


def test_rows_that_are_not_selected_are_exactly_zero():
    lm, batch = kind("llama"), make_batch()
    batch["input_ids"] = torch.arange(2 * LENGTH).view(2, LENGTH) + 2  # each token once
    selected, seen = some(batch), []

    def watch(module: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: seen.append(gradient.ne(0).any(-1)))

    embedding: Any = lm.model.get_input_embeddings()
    for module in (embedding, *lm.model.model.layers):
        module.register_forward_hook(watch)
    lm(batch, selected).loss.backward()
    assert len(seen) == 3 and all(torch.equal(rows, selected) for rows in seen)
    ids = batch["input_ids"][~selected]
    assert not embedding.weight.grad[ids].any()


def test_products_of_the_backward_pass_are_of_selected_rows():
    lm, batch = kind("llama"), make_batch()
    flops = []
    for selected in (some(batch), torch.ones_like(some(batch))):
        with selected_backward(lm.model) as rows:
            hidden = hidden_states(lm.model, batch)
        rows.select(selected)
        with FlopCounterMode(display=False) as counter:
            hidden.sum().backward()
        flops.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    layers = lm.model.model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    assert flops == [4 * weights * int(some(batch).sum()), 4 * weights * 2 * LENGTH]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_all_rows_it_is_the_exact_gradient(name):
    lm, batch = kind(name), make_batch()
    every = torch.ones(2, LENGTH)
    batch["targets"] = batch["targets"].clamp(min=0)
    exact = gradients(lm, lm(batch, every, takes_all=True).loss)
    assert_same(gradients(lm, lm(batch, every).loss), exact, 1e-12)


def test_it_is_bitwise_repeatable_and_adds_up_over_micro_batches():
    lm, batches = make_lm("llama"), [make_batch(seed) for seed in range(2)]
    lm.backward = "selected"

    def losses() -> list[Tensor]:  # both forward passes before the first backward pass
        return [lm(batch, some(batch), denominator=9.0).loss for batch in batches]

    one, other = (gradients(lm, torch.stack(losses()).sum()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    apart = [gradients(lm, loss) for loss in losses()]
    assert_same(one, {name: apart[0][name] + apart[1][name] for name in one}, 1e-5)


@pytest.mark.parametrize("keeps", [0, 1, LENGTH])
def test_a_capacity_pads_and_reads_nothing_back(keeps):
    lm, batch = kind("qwen3"), make_batch()
    selected = (torch.arange(2 * LENGTH) >= 2 * LENGTH - keeps).view(2, LENGTH)
    found = []
    for capacity in (None, 2 * LENGTH - 3, 4 * LENGTH):  # the last row is selected, if any
        with selected_backward(lm.model) as rows:
            hidden = hidden_states(lm.model, batch)
        with NothingRead() if capacity else nullcontext():
            rows.select(selected, capacity)
            loss = (hidden * selected[..., None]).square().sum()
            found.append(gradients(lm, loss))
    for other in found[1:]:
        assert_same(other, found[0], 1e-12)


class NothingRead(TorchDispatchMode):
    """Refuses what waits for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_get_the_gradients_of_the_definition(dropout, recomputes):
    lm, batch = kind("llama"), make_batch()
    names = ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, lora_dropout=dropout)
    lm.model = get_peft_model(lm.model, config).double().get_base_model()  # type: ignore
    found = assert_same_with_dropout(lm.train(), batch, recomputes, 1e-12)
    assert len(found) == 2 * 2 * 3 and "lora" in min(found)


def assert_same_with_dropout(
    lm: SelectiveLM, batch: Batch, recomputes: bool, tolerance: float
) -> dict[str, Tensor]:
    """The definition's gradients where the forward passes draw the same, and twice the same."""

    def after(seed: int, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(seed)
        value = loss()
        torch.manual_seed(9)  # a backward pass has no use for the state of then
        drawn = torch.get_rng_state()
        found = gradients(lm, value)
        assert torch.equal(torch.get_rng_state(), drawn)
        return value, found

    selected = some(batch)
    expected = after(1, lambda: by_definition(lm, batch, selected))
    if recomputes:
        lm.model.activation_checkpointing_enable()
    first, again = (after(1, lambda: lm(batch, lambda _: selected).loss) for _ in range(2))
    assert torch.equal(first[0], expected[0])
    assert_same(first[1], expected[1], tolerance)
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    return first[1]


DROPOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden": ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.2}),
    "attention": ("gpt2", {"attn_pdrop": 0.3, "resid_pdrop": 0.2}),
    "neox": ("gpt_neox", {"hidden_dropout": 0.3, "attention_dropout": 0.2}),
    "few keys": ("llama", {"attention_dropout": 0.3}),
}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_that_of_the_forward_pass(name, recomputes):
    base, fields = DROPOUTS[name]
    lm = kind(base, **fields)
    if name != "hidden":
        lm.model.set_attn_implementation("eager")
    rounds = name == "few keys"  # its weights are computed in float32
    assert_same_with_dropout(lm, make_batch(), recomputes, 1e-6 if rounds else 1e-12)
    other = kind(base)
    plain = gradients(other, other(make_batch(), some(make_batch())).loss)
    dropped = gradients(lm, lm(make_batch(), some(make_batch())).loss)
    assert any((dropped[key] - plain[key]).norm() > 0.1 * plain[key].norm() for key in plain)


def test_keys_are_kept_by_a_budget_and_else_computed_again():
    lm, batch = kind("qwen3"), make_batch()
    lm.model.activation_checkpointing_enable()
    layers, size = lm.model.model.layers, 2 * 2 * LENGTH * 2 * 8 * 8  # keys, values: (B, T, H, 8)
    projection: Any = layers[0].self_attn.k_proj
    calls: list[int] = []
    projection.register_forward_hook(lambda _, inputs, out: calls.append(rows_of(out)))
    found, rows = [], int(some(batch).sum())
    for lm.keys_cache_bytes in (0, size - 1, size, 2 * size):
        calls.clear()
        found.append(gradients(lm, lm(batch, some(batch)).loss))
        again = [2 * LENGTH] * (lm.keys_cache_bytes < size)
        assert calls == [2 * LENGTH, *again, rows]
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


def test_autocast_is_that_of_the_forward_pass():
    lm, batch = make_lm("llama"), make_batch()
    lm.backward = "selected"
    with torch.autocast("cpu", torch.bfloat16):
        losses = by_definition(lm, batch, some(batch)), lm(batch, some(batch)).loss
    assert torch.equal(*losses)
    expected, found = (gradients(lm, loss) for loss in losses)
    assert_same(found, expected, 0.03)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mamba", {}, "tokens of MambaBlock mix outside of attention"),
        ("rwkv", {}, "RwkvBlock gives more than hidden states"),
        ("llama", {"attention_dropout": 0.1}, "LlamaDecoderLayer has a dropout of 0.1 within sdpa"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, fields, message):
    lm = make_lm(name, **fields)
    check_model(lm, make_batch())
    lm.backward = "selected"
    with pytest.raises(UserError, match=f"{message}, .*backward=exact does"):
        check_model(lm, make_batch())


def test_other_attentions_are_refused_and_every_kind_is_not():
    lm = make_lm("llama")
    lm.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        UserError, match="LlamaForCausalLM has attn_implementation=flash_attention_2"
    ):
        check_rows(lm.model, make_batch())
    for name in KINDS:
        check_model(kind(name).float(), make_batch())


# ---- two processes ------------------------------------------------------------------------------


def average_over_ranks(folder: str) -> None:
    """One of two processes: what DDP makes of two micro-batches a rank, against their mean."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    lm, batches = kind("tied"), [make_batch(seed) for seed in range(4)]

    def loss(model: Any, batch: Batch) -> Tensor:
        return model(batch, lambda _: some(batch), denominator=7.0).loss

    alone = [gradients(lm, loss(lm, batch)) for batch in batches]
    expected = {name: torch.stack([one[name] for one in alone]).sum(0) / 2 for name in alone[0]}
    for unused in (False, True):
        lm = kind("tied")  # the hooks of an earlier wrapper stay on a model until it is collected
        wrapped = DistributedDataParallel(lm, find_unused_parameters=unused)
        with wrapped.no_sync():
            loss(wrapped, batches[rank]).backward()
        loss(wrapped, batches[rank + 2]).backward()
        found = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
        assert_same(found, expected, 1e-12)
    del wrapped  # its reducer, last to hold the group, would wait with the GIL for a thread's end
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    command = [sys.executable, __file__, "average_over_ranks", str(tmp_path)]
    codes, said = warm.run_ranks(2, command)
    assert codes == [0, 0], said


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
