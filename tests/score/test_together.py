"""A model that several processes hold scores as one process does."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import warm
from model_helpers import ARCHITECTURES, LLAMA
from slm.errors import UserError
from slm.model.architecture import new_model
from slm.model.folder import save_model
from slm.score.command import load_reference, score
from slm.store.shards import Corpus, References

WORDS: dict[str, Any] = {
    "device": "cpu",
    "entropy": True,
    "batch_size": 3,
}  # the last batch has one window


def made(folder: Path, config: dict[str, Any], tokenizer: Any) -> Path:
    torch.manual_seed(0)
    save_model(folder, new_model(config, 300, None), tokenizer, "card", {})
    return folder


def command(corpus: Corpus, model: Path, out: Path, *more: str) -> list[str]:
    words = [f"{key}={str(value).lower()}" for key, value in WORDS.items()]
    paths = [f"corpus={corpus.folder}", f"reference_model={model}", f"out={out}"]
    return [sys.executable, "-m", "slm.score", *paths, *words, *more]


def assert_close(one: References, two: References) -> None:
    for name in ("logprobs", "entropy"):
        for shard in one.shards:
            found, expected = (np.array(s.column(name, shard.index)[1:]) for s in (two, one))
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "key, config, named",
    [
        ("tp_size", LLAMA, {"tp_size": 2}),
        ("fsdp_size", LLAMA | {"tie_word_embeddings": True}, {"direct": True}),
        ("fsdp_size", ARCHITECTURES["gpt2"], {"direct": True}),  # without a tensor-parallel plan
    ],
)
def test_processes_that_hold_a_model_together_score_as_one(
    tmp_path, text_corpus, tokenizer, key, config, named
):
    folder = made(tmp_path / "model", config, tokenizer)
    score(text_corpus, tmp_path / "one", reference_model=folder, **WORDS)
    one = References.open(tmp_path / "one")
    words = command(text_corpus, folder, tmp_path / "two", f"{key}=2")
    codes, said = warm.run_ranks(2, words)
    assert codes == [0, 0], said
    two = References.open(tmp_path / "two")
    assert two.manifest["scoring"] == one.manifest["scoring"] | named
    assert_close(one, two)
    if key == "tp_size":
        codes, said = warm.run_ranks(2, [*words, "store_dtype=float16"])  # another run's: no hang
        assert codes == [1, 1] and said.count("holds another run") == 1, said
    with pytest.raises(UserError, match=f"{key} is 2, and torchrun started 1 processes here"):
        load_reference(
            str(folder),
            text_corpus,
            "cpu",
            "float32",
            tp_size=2 if key == "tp_size" else 1,
            fsdp_size=2 if key == "fsdp_size" else 1,
        )


def test_what_cannot_be_held_together(tmp_path, text_corpus, tokenizer):
    folder = made(tmp_path / "model", LLAMA, tokenizer)
    (folder / "model.safetensors").rename(folder / "other.bin")
    torch.save(load_file(folder / "other.bin"), folder / "pytorch_model.bin")
    words = command(text_corpus, folder, tmp_path / "out", "fsdp_size=2")
    codes, said = warm.run_ranks(2, words)
    assert codes == [1, 1] and said.count("has no safetensors with the weights") == 1, said
