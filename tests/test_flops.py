"""Model FLOPs against the parameters of a small model, counted by hand."""

from model_helpers import small_llama
from slm.flops import flops_per_token, forward_flops_per_token


def test_flops_of_a_small_llama_by_hand() -> None:
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8  # queries, keys, values, output
    body = 2 * (attention + 3 * 8 * 12 + 2 * 8) + 8  # two layers with two norms, a last norm
    head = 50 * 8
    expected = 6 * body + (2 + 4 * 0.25) * head + 12 * 2 * 8 * 16
    model = small_llama()
    assert flops_per_token(model, seq_len=16, select_ratio=0.25) == expected
    # Scoring does the forward alone, which is a third of training on every token.
    assert forward_flops_per_token(model, seq_len=16) == 2 * (body + head) + 4 * 2 * 8 * 16
    whole = flops_per_token(model, seq_len=16, select_ratio=1.0)
    assert forward_flops_per_token(model, seq_len=16) == whole / 3
    tied = small_llama(tie_word_embeddings=True)
    assert len(list(tied.parameters())) == len(list(model.parameters())) - 1
    assert flops_per_token(tied, seq_len=16, select_ratio=0.25) == expected
