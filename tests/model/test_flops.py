"""Model FLOPs against the parameters of a small model, counted by hand."""

import pytest

from model_helpers import SIZES, VOCAB, small_llama
from slm.model.architecture import new_model
from slm.model.flops import flops_per_token, forward_flops_per_token


def test_flops_of_a_small_llama_by_hand() -> None:
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8  # queries, keys, values, output
    body = 2 * (attention + 3 * 8 * 12 + 2 * 8) + 8  # two layers with two norms, a last norm
    head = 50 * 8
    expected = 6 * body + (2 + 4 * 0.25) * head + 12 * 2 * 8 * 16
    model = small_llama()
    assert flops_per_token(model, seq_len=16, select_ratio=0.25) == expected
    cut = (2 + 4 * 0.25) * (body + head) + (4 + 8 * 0.25) * 2 * 8 * 16
    assert flops_per_token(model, seq_len=16, select_ratio=0.25, backward="selected") == cut
    # Scoring does the forward alone, which is a third of training on every token.
    assert forward_flops_per_token(model, seq_len=16) == 2 * (body + head) + 4 * 2 * 8 * 16
    whole = flops_per_token(model, seq_len=16, select_ratio=1.0)
    assert whole is not None and forward_flops_per_token(model, seq_len=16) == whole / 3
    tied = small_llama(tie_word_embeddings=True)
    assert len(list(tied.parameters())) == len(list(model.parameters())) - 1
    assert flops_per_token(tied, seq_len=16, select_ratio=0.25) == expected


MIXTURES = {  # the experts that a token goes to, of how many: by the names of four families
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_of_a_mixture_only_the_chosen_experts_count(model_type):
    fields = SIZES | {"model_type": model_type, "num_key_value_heads": 4} | MIXTURES[model_type]
    model = new_model(fields, VOCAB, None)
    chosen = 2 * 2 * 3 * 16 * 24  # layers, experts, matrices of each
    others = sum(p.numel() for p in model.parameters()) - 2 * VOCAB * 16 - 4 * chosen
    attention = 2 * 16 * 10
    expected = 2 * (others + chosen) + 2 * VOCAB * 16 + 4 * attention
    assert forward_flops_per_token(model, seq_len=10) == expected
    whole = flops_per_token(model, seq_len=10, select_ratio=1.0)
    assert whole is not None and whole == 3 * expected


def test_a_mixture_of_another_build_has_no_number():
    fields = {"model_type": "jetmoe", "hidden_size": 16, "num_hidden_layers": 1, "kv_channels": 8}
    fields |= {"num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size": 8}
    model = new_model(fields, VOCAB, None)
    assert forward_flops_per_token(model, seq_len=10) is None
    assert flops_per_token(model, seq_len=10, select_ratio=1.0) is None
