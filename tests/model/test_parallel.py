"""Models whose layers are shared out over ranks, against whole ones."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import warm
from model_helpers import ARCHITECTURES, VOCAB, make_batch
from slm.errors import UserError
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM, check_model
from slm.model.parallel import TENSOR_PARALLEL, check_heads, plan_of
from slm.model.sharded import (
    Cut,
    deal_out,
    fill_from,
    gathered,
    local,
    shard,
    weights_in,
    whole_of,
    without_weights,
)
from slm_kernels import vocabulary

KINDS = {
    "qwen3": {"tie_word_embeddings": True},  # norms within heads, which see a part of them
    "phi": {},  # biases, in the head as well
}


def make(kind: str, **more: int) -> SelectiveLM:
    torch.manual_seed(0)
    more = (KINDS[kind] if kind in KINDS else {}) | more
    return SelectiveLM(new_model(ARCHITECTURES[kind] | more, VOCAB, None))


@pytest.mark.parametrize(
    ("kind", "more", "sentence"),
    [
        ("gpt2", {}, "GPT2LMHeadModel has no plan in transformers of how its layers are cut"),
        ("llama", {"num_key_value_heads": 1}, "is 2, and the model's num_key_value_heads is 1"),
        ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "num_attention_heads is 1"),
        ("mixtral", {}, r"cuts model\.layers\.0\.mlp\.experts\.gate_up_proj as 'packed_colwise'"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(kind, more, sentence):
    kinds = ARCHITECTURES | {"mixtral": ARCHITECTURES["llama"] | {"model_type": "mixtral"}}
    model = new_model(kinds[kind] | more, VOCAB, None)
    with pytest.raises(UserError, match=f"tensor_parallel_size.*{sentence}"):
        check_heads(model, 2)
        plan_of(model)


# ---- four processes: 2 x 2 ----------------------------------------------------------------------


def check_kind(folder: Path, kind: str, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", TENSOR_PARALLEL))
    cut = Cut(mesh["data_parallel"], within=mesh[TENSOR_PARALLEL])
    whole, batch = make(kind), make_batch()
    if rank == 0:
        whole.model.save_pretrained(folder / kind)
    dist.barrier()
    with without_weights():
        lm, read = make(kind), make(kind)
    for one in (lm, read):
        shard(one, one.model, cut)
    files = weights_in(folder / kind, read)
    deal_out(lm, make(kind) if rank == 0 else None)
    assert files is not None
    fill_from(files, read)
    for (name, mine), theirs in zip(lm.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(local(mine), local(theirs)), name
    assert sum(local(p).numel() for p in lm.parameters()) < 0.3 * whole.model.num_parameters()
    check_model(lm, batch)
    compare(lm, whole, batch)
    for name, value in (gathered(lm) or {}).items():
        assert torch.equal(value, whole.state_dict()[name]), name


def compare(lm: SelectiveLM, whole: SelectiveLM, batch: dict[str, torch.Tensor]) -> None:
    """Losses, entropies and gradients; of the vocabulary a rank computes its part."""
    found, wanted = (one(batch, want_entropy=True) for one in (lm, whole))
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.entropy, wanted.entropy)
    weight = torch.rand(batch["targets"].shape, generator=torch.Generator().manual_seed(1))
    rows: list[int] = []
    own = vocabulary.rows_here
    vocabulary.rows_here = lambda tensor: noted(rows, own(tensor))
    for one in (lm, whole):
        one(batch, weight.clone()).loss.backward()
    vocabulary.rows_here = own
    assert rows and {*rows} <= {31, 30}, rows
    for (name, mine), theirs in zip(lm.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(whole_of(mine.grad), theirs.grad, msg=name)


def noted(rows: list[int], part: torch.Tensor | None) -> torch.Tensor | None:
    rows += [] if part is None else [len(part)]
    return part


def on_a_rank(folder: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=4)
    for kind in KINDS:
        check_kind(Path(folder), kind, rank)
    with without_weights():
        small = make("llama", intermediate_size=2)
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("data_parallel", TENSOR_PARALLEL))
    with pytest.raises(UserError, match="num_key_value_heads is 2"):
        shard(small, small.model, Cut(mesh["data_parallel"], within=mesh[TENSOR_PARALLEL]))
    with without_weights():
        small = make("llama", intermediate_size=2, num_key_value_heads=4)
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight is cut along a length of 2"):
        shard(small, small.model, Cut(mesh["data_parallel"], within=mesh[TENSOR_PARALLEL]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_layers_that_are_shared_out_are_the_whole_model(tmp_path):
    codes, said = warm.run_ranks(4, [sys.executable, __file__, str(tmp_path)])
    assert codes == [0] * 4, said


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_a_rank(sys.argv[1])
