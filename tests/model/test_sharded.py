"""Models that are cut, filled and put together again, against whole ones."""

import copy
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
from slm.model.build import SelectiveLM, check_model, load_model
from slm.model.head import head_arguments
from slm.model.sharded import (
    Cut,
    assembled,
    deal_out,
    fill_from,
    gathered,
    layers_of,
    local,
    refused_together,
    root_gathered,
    shard,
    weights_in,
    without_weights,
)


def make(kind: str, counted: float = 7.0) -> SelectiveLM:
    """With a buffer that is saved, as some mixtures of experts have one."""
    torch.manual_seed(0)
    model = new_model(ARCHITECTURES[kind], VOCAB, None)
    model.register_buffer("counted", torch.full((3,), counted))
    return SelectiveLM(model).eval()


def outlined(kind: str) -> SelectiveLM:
    with without_weights():
        return make(kind, counted=0.0)


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2"])
def test_an_outline_has_shapes_buffers_and_ties_and_no_weights(kind):
    whole, lm = make(kind), outlined(kind)
    assert all(parameter.is_meta for parameter in lm.parameters())
    buffers = dict(whole.named_buffers())
    for name, buffer in lm.named_buffers():
        assert name == "model.counted" or torch.equal(buffer, buffers[name])
    assert [(n, p.shape) for n, p in lm.named_parameters()] == [
        (n, p.shape) for n, p in whole.named_parameters()
    ]
    assert not any(p.is_meta for p in make(kind).parameters())  # put back
    assert len(layers_of(lm.model)) == 2


def test_a_model_is_assembled_with_its_weights(tmp_path):
    whole = new_model(ARCHITECTURES["llama tied"], VOCAB, None).eval()
    made = assembled(outlined("llama tied").model, whole.state_dict())
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in made.state_dict().items())
    batch = make_batch()
    assert torch.equal(SelectiveLM(made)(batch).loss, SelectiveLM(whole)(batch).loss)


def test_weights_are_read_by_their_names_and_shapes_alone(tmp_path):
    make("llama").model.save_pretrained(tmp_path)
    files = weights_in(tmp_path, outlined("llama"))
    assert files is not None and set(files.values()) == {tmp_path / "model.safetensors"}
    assert weights_in(tmp_path, outlined("gpt2")) is None
    lm = outlined("llama")
    lm.model.register_buffer("more", torch.zeros(1))
    assert weights_in(tmp_path, lm) is None
    fields = ARCHITECTURES["llama"] | {"intermediate_size": 25}
    with without_weights():
        other = SelectiveLM(new_model(fields, VOCAB, None))
    assert weights_in(tmp_path, other) is None


# ---- two processes -----------------------------------------------------------------------------


def cut_and_put_together(folder: str, kind: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole, batch = make(kind), make_batch()
    if rank == 0:
        whole.model.save_pretrained(f"{folder}/model", max_shard_size="2KB")  # several files
    dist.barrier()
    for filled in ("read", "dealt"):
        lm = outlined(kind)
        shard(lm, lm.model, Cut(mesh))
        if filled == "read":
            files = weights_in(Path(folder, "model"), lm)
            assert files is not None and len(set(files.values())) > 1
            fill_from(files, lm)
        else:
            deal_out(lm, copy.deepcopy(whole) if rank == 0 else None)
        mine, all_of_it = (sum(local(p).numel() for p in m.parameters()) for m in (lm, whole))
        assert mine < 0.6 * all_of_it
        check_model(lm, batch)
        assert torch.equal(lm(batch).loss, whole(batch).loss)
        found = gathered(lm)
        assert (found is None) == (rank == 1)
        for name, value in (found or {}).items():
            assert torch.equal(value, whole.state_dict()[name]), name
    half = outlined(kind)
    shard(half, half.model, Cut(mesh, torch.bfloat16))
    deal_out(half, copy.deepcopy(whole) if rank == 0 else None)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    with root_gathered(half, batch):
        assert head_arguments(half.model)["weight"].dtype == torch.bfloat16
    assert 0 < (half(batch).loss - whole(batch).loss).abs().max() < 0.05
    with pytest.raises(UserError if rank == 0 else SystemExit), refused_together():
        if rank == 1:
            raise UserError("of rank 1")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2"])
def test_shards_are_the_whole_model(tmp_path, kind):
    codes, said = warm.run_ranks(
        2, [sys.executable, __file__, "cut_and_put_together", str(tmp_path), kind]
    )
    assert codes == [0, 0], said
    loaded = SelectiveLM(load_model(tmp_path / "model"))
    assert torch.equal(loaded(make_batch()).loss, make(kind)(make_batch()).loss)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
