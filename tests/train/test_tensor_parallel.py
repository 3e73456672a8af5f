"""trainer.strategy.tensor_parallel_size: what one process computes, every layer shared out."""

from pathlib import Path

import pytest

from sharded_helpers import (
    KEPT,
    OF_A_FORWARD,
    OF_ONE_RANK,
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
CASES = [
    pytest.param(2, "true", "global"),
    pytest.param(4, "true", "sequence", marks=SLOW),
    pytest.param(4, "false", "global", marks=SLOW),
]
# AdamW divides by the gradient's size: of one of 1e-8 the rounding of sums in another order shows.
EPS = "optimizer.adamw.eps=1e-6"


@pytest.mark.parametrize(("ranks", "tied", "scope"), CASES)
def test_losses_and_weights_are_those_of_one_process(tmp_path, text_corpus, ranks, tied, scope):
    more = f"model.architecture.tie_word_embeddings={tied}", f"selection.scope={scope}", EPS
    in_one(words(tmp_path / "one", text_corpus, *more))
    said = on_ranks(ranks, words(tmp_path / "ranks", text_corpus, *more), tensor_parallel=2)
    assert "suboptimal" not in said  # torch's remark on how tensors are gathered
    of_a_forward = OF_A_FORWARD if scope == "global" else ()
    same(tmp_path / "one", tmp_path / "ranks", (*OF_ONE_RANK, *of_a_forward))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, made_corpus) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "whole"
    on_ranks(4, words(folder, made_corpus, *KEPT, EPS), tensor_parallel=2)
    return folder


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_in_other_shapes(tmp_path, text_corpus, finished):
    """From 2 x 2 ranks to 2 x 2, to three other shapes; and from one of these to 2 x 2."""
    line = (*KEPT, EPS)
    on_ranks(4, words(cut(finished, tmp_path / "again"), text_corpus, *line), tensor_parallel=2)
    same_results(finished, tmp_path / "again")
    for ranks, size in ((2, 2), (2, 1)):
        run = cut(finished, tmp_path / f"{ranks}{size}")
        on_ranks(ranks, words(run, text_corpus, *line), tensor_parallel=size)
        same(finished, run)
    in_one(words(cut(finished, tmp_path / "one"), text_corpus, *line))
    same(finished, tmp_path / "one")
    back = cut(tmp_path / "one", tmp_path / "back")
    on_ranks(4, words(back, text_corpus, *line), tensor_parallel=2)
    same(finished, back)
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
