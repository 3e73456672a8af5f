"""trainer=fsdp: what one process computes, in shards; in layers that ranks share out."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import warm
from sharded_helpers import (
    KEPT,
    OF_A_FORWARD,
    OF_ONE_RANK,
    RANKS,
    TRAIN,
    cut,
    in_one,
    on_ranks,
    refused,
    same,
    words,
)
from slm.verify import verify
from train_helpers import same_results

SLOW = pytest.mark.slow
# AdamW divides by the gradient's size: of one of 1e-8 the rounding of sums in another order shows.
EPS = "optimizer.adamw.eps=1e-6"
CASES = [
    pytest.param(1, "true", "global"),
    pytest.param(2, "true", "global"),
    pytest.param(2, "false", "sequence", marks=SLOW),
    pytest.param(4, "true", "sequence", marks=SLOW),
    pytest.param(4, "false", "global", marks=SLOW),
]


@pytest.mark.parametrize(("ranks", "tied", "scope"), CASES)
def test_losses_and_weights_are_those_of_one_process(tmp_path, text_corpus, ranks, tied, scope):
    more = f"model.architecture.tie_word_embeddings={tied}", f"selection.scope={scope}"
    in_one(words(tmp_path / "one", text_corpus, *more))
    on_ranks(ranks, words(tmp_path / "ranks", text_corpus, *more))
    of_a_forward = OF_A_FORWARD if scope == "global" else ()
    same(tmp_path / "one", tmp_path / "ranks", (*OF_ONE_RANK, *of_a_forward))


@pytest.fixture
def base(tmp_path, text_corpus) -> Path:
    """A model of some steps, and its folder."""
    in_one(words(tmp_path / "base", text_corpus))
    return tmp_path / "base" / "model"


@pytest.mark.slow
def test_a_loaded_model_trains_as_in_one_process(tmp_path, text_corpus, base):
    """From a folder; with what else runs inside the layers, and between the steps."""
    more = (f"model.init_from='{base}'", "model.activation_checkpointing=true")
    more += ("model.backward=selected", "callbacks=dynamics", "selection.scope=sequence")
    more += (f"callbacks.dynamics.corpus='{text_corpus.folder}'",)
    more += ("callbacks.dynamics.num_targets=100", "callbacks.dynamics.batch_size=1")
    in_one(words(tmp_path / "one", text_corpus, *more))
    on_ranks(2, words(tmp_path / "ranks", text_corpus, *more))
    same(tmp_path / "one", tmp_path / "ranks")
    losses = [sorted((tmp_path / name).rglob("losses-*.npy")) for name in ("one", "ranks")]
    assert len(losses[0]) == len(losses[1]) > 2
    for one, other in zip(*losses, strict=True):
        np.testing.assert_allclose(np.load(one), np.load(other), rtol=1e-5)


HELD = """
from slm.model.sharded import local
from slm.train.module import SelectiveModule


def on_train_end(self):
    (reference,) = self.online
    mine, whole = zip(*((local(p).numel(), p.numel()) for p in reference.parameters()))
    print(f"held: {sum(mine) / sum(whole):.1f}")


SelectiveModule.on_train_end = on_train_end
"""


@pytest.mark.slow
def test_an_online_reference_is_in_shards_too(tmp_path, text_corpus, base):
    module = tmp_path / "held.py"
    module.write_text(HELD)
    more = (f"online_reference='{base}'", "selection=excess", "selection.scope=sequence")
    more += (f"modules=['{module}']", EPS)
    in_one(words(tmp_path / "one", text_corpus, *more))
    said = on_ranks(2, words(tmp_path / "ranks", text_corpus, *more))
    assert said.count("held: 0.5") == 2, said
    differences = ("slm/excess_mean", "slm/excess_mean_selected")  # of numbers that are nearly one
    same(tmp_path / "one", tmp_path / "ranks", (*OF_ONE_RANK, *differences))


@pytest.mark.slow
def test_rank_0_alone_says_what_is_refused(tmp_path, text_corpus):
    line = words(tmp_path / "run", text_corpus, "data.micro_batch_size=3")
    expected = "data.batch_size (8) must be a multiple of data.micro_batch_size * ranks (3 * 2): "
    expected += "data.micro_batch_size=2 does"
    assert expected in refused(2, line)
    # What only a forward of the model tells, when it is cut already.
    softcap = "+model.architecture.final_logit_softcapping=0.5"
    gemma = ("model.architecture.model_type=gemma2", "+model.architecture.head_dim=8")
    line = words(tmp_path / "run", text_corpus, "data.micro_batch_size=4", *gemma, softcap)
    module = tmp_path / "mine.py"
    module.write_text(UNKNOWN_SCALE)
    line = [*line, f"modules=['{module}']"]
    assert "its logits are not its head applied to its hidden states" in refused(2, line)


UNKNOWN_SCALE = """
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM

own = Gemma2ForCausalLM.forward


def forward(self, *args, **kwargs):
    out = own(self, *args, **kwargs)
    out.logits = out.logits * 0.5
    return out


Gemma2ForCausalLM.forward = forward
"""


@pytest.mark.slow
def test_ranks_with_other_files_are_refused(tmp_path, made_corpus, make_corpus):
    shutil.copytree(made_corpus.folder, tmp_path / "corpus0")
    make_corpus(tmp_path / "corpus1", [np.arange(16 * 40 + 1) % 250], 16)
    line = words(tmp_path / "run", made_corpus, "data.micro_batch_size=4", "data.heldout=null")
    line += [f"data.corpus='{tmp_path}/corpus${{oc.env:LOCAL_RANK}}'"]
    said = refused(2, line)
    assert " differs from rank 0 in corpus: " in said and "rank 1 on " in said


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_ranks(tmp_path, text_corpus):
    line = words(
        tmp_path / "run", text_corpus, "data.micro_batch_size=4", "optimizer.adamw.lr=1e30"
    )
    codes, said = warm.run_ranks(2, [*TRAIN, *line, *RANKS, "trainer.devices=2"])
    assert codes == [1, 1], said
    assert "stopped before the update" in said and not (tmp_path / "run" / "model").exists()


# ---- trainer.strategy.tensor_parallel_size -------------------------------------------------------

SHARED = [
    pytest.param(2, "true", "global"),
    pytest.param(4, "true", "sequence", marks=SLOW),
    pytest.param(4, "false", "global", marks=SLOW),
]


@pytest.mark.parametrize(("ranks", "tied", "scope"), SHARED)
def test_layers_that_ranks_share_out_train_as_in_one_process(
    tmp_path, text_corpus, ranks, tied, scope
):
    more = f"model.architecture.tie_word_embeddings={tied}", f"selection.scope={scope}", EPS
    in_one(words(tmp_path / "one", text_corpus, *more))
    said = on_ranks(ranks, words(tmp_path / "ranks", text_corpus, *more), tensor_parallel=2)
    assert "suboptimal" not in said  # torch's remark on how tensors are gathered
    for once in ("new run in ", "evaluation: ", "cross-entropy on cpu", "checkpoints: "):
        assert said.count(once) == 1, (once, said)
    of_a_forward = OF_A_FORWARD if scope == "global" else ()
    same(tmp_path / "one", tmp_path / "ranks", (*OF_ONE_RANK, *of_a_forward))


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_in_another_shape(tmp_path, text_corpus):
    """From 2 x 2 ranks to 2 x 2 and to one process, and from there to 2 x 2."""
    whole, line = tmp_path / "whole", (*KEPT, EPS)
    on_ranks(4, words(whole, text_corpus, *line), tensor_parallel=2)
    on_ranks(4, words(cut(whole, tmp_path / "again"), text_corpus, *line), tensor_parallel=2)
    same_results(whole, tmp_path / "again")
    in_one(words(cut(whole, tmp_path / "one"), text_corpus, *line))
    same(whole, tmp_path / "one")
    back = cut(tmp_path / "one", tmp_path / "back")
    on_ranks(4, words(back, text_corpus, *line), tensor_parallel=2)
    same(whole, back)
    assert [good for _, good, _ in verify(back / "checkpoints")] == [True] * 4


@pytest.mark.slow
def test_wrong_sizes_are_refused_by_rank_0_alone(tmp_path, text_corpus):
    micro, size = "data.micro_batch_size=4", "trainer.strategy.tensor_parallel_size"
    line = words(tmp_path / "run", text_corpus, micro)
    assert f"{size} (3) must divide the number of ranks (2)" in refused(2, line, 3)
    heads = "model.architecture.num_attention_heads=1", "model.architecture.num_key_value_heads=1"
    line = words(tmp_path / "run", text_corpus, micro, *heads)
    assert f"{size} is 2, and the model's num_attention_heads is 1" in refused(2, line, 2)
    assert not (tmp_path / "run" / "model").exists()


# What is whole on the ranks that share layers out is updated by each of them.
LOOKS = """
import slm.train.fit as fit
from slm.model.sharded import together

own = fit.whole_lm


def whole_lm(lm):
    for name, value in lm.named_parameters():
        if value.device_mesh.ndim == 1:
            found = {tuple(theirs) for theirs in together(value.full_tensor().tolist())}
            assert len(found) == 1, name
            print("alike:", name)
    return own(lm)


fit.whole_lm = whole_lm
"""


@pytest.mark.slow
def test_ranks_that_share_layers_out_drop_alike(tmp_path, text_corpus):
    module = tmp_path / "looks.py"
    module.write_text(LOOKS)
    kind = ("model.architecture.model_type=phi", "+model.architecture.resid_pdrop=0.3")
    line = words(tmp_path / "run", text_corpus, *kind, f"modules=['{module}']")
    said = on_ranks(2, line, tensor_parallel=2)
    assert said.count("alike: model.model.layers.1.input_layernorm.weight") == 2, said
