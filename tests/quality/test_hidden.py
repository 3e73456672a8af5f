"""Mean last hidden states, against one document at a time and no padding."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from model_helpers import small_llama
from slm.errors import UserError
from slm.model.folder import save_model
from slm.quality.hidden import Hidden

TEXTS = ["one text of some words", "x", "a longer text " * 9, "Zahlen wie 3,1415 <|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> str:
    path = tmp_path_factory.mktemp("hidden") / "model"
    save_model(path, small_llama(300), tokenizer, "card", {})
    return str(path)


@torch.no_grad()
def by_hand(model: Any, ids: list[int], eos: int) -> np.ndarray:
    states = model.model(torch.tensor([[eos, *ids]])).last_hidden_state[0, 1:]
    return states.mean(dim=0).numpy()


def test_features_are_means_over_the_first_tokens(folder, tokenizer):
    hidden = Hidden(folder, 20, 3, "float32", "cpu")
    found = hidden(TEXTS)
    assert found.shape == (4, hidden.width) and found.dtype == np.float32
    for row, text in zip(found[:3], TEXTS[:3], strict=True):  # the last one's EOS is text
        ids = tokenizer.encode(text, add_special_tokens=False)[:20]
        expected = by_hand(hidden.model, ids, tokenizer.eos_token_id)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)
    assert len(hidden.encode(["a longer text " * 999])[0]) == 20
    assert tokenizer.eos_token_id not in hidden.encode(TEXTS[3:])[0]


def test_a_context_longer_than_the_model(folder):
    with pytest.raises(UserError, match="context is 9999, with an EOS before it") as refused:
        Hidden(folder, 9999, 3, "float32", "cpu")
    advised = re.search(
        r"more than the (\d+) positions of .*: set context=(\d+) or", str(refused.value)
    )
    assert advised is not None and int(advised[2]) == int(advised[1]) - 1
    Hidden(folder, int(advised[2]), 3, "float32", "cpu")
