"""A reference model's batches one after the other: what each alone gives, read ahead."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from model_helpers import LLAMA
from slm.errors import UserError
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM
from slm.model.folder import save_model
from slm.score.command import load_reference, score
from slm.score.reference import READ_AHEAD, ModelScores, window_scores
from slm.store.columns import columns_named
from slm.store.shards import References
from slm.store.windows import Windows


@pytest.fixture
def source(text_corpus) -> ModelScores:
    torch.manual_seed(0)
    return ModelScores(SelectiveLM(new_model(LLAMA, 300, None)), Windows(text_corpus), ["entropy"])


def test_a_stream_is_each_batch_alone(source):
    batches = [np.arange(0, 3), np.arange(7, 9), np.array([11]), np.arange(20, 24)]
    for count in range(5):
        found = [*source.stream(iter(batches[:count]))]
        assert [numbers.tolist() for numbers, _ in found] == [b.tolist() for b in batches[:count]]
        for numbers, arrays in found:
            alone = window_scores(source.lm, source.windows, numbers, columns_named(["entropy"]))
            for name, values in alone.items():
                np.testing.assert_array_equal(arrays[name], values)
            np.testing.assert_array_equal(source.scores(numbers)["logprobs"], alone["logprobs"])


def test_another_thread_reads_a_few_batches_ahead(source, monkeypatch):
    own, reads = source.windows.batch, []

    def batch(numbers: np.ndarray) -> Any:
        reads.append(threading.current_thread())
        return own(numbers)

    monkeypatch.setattr(source.windows, "batch", batch)
    stream = source.stream(np.array([i]) for i in range(10))
    next(stream)
    assert threading.current_thread() not in reads
    assert 2 <= len(reads) <= 2 + READ_AHEAD  # it computes the second by now
    assert len([*stream]) == 9 and len(reads) == 10


def test_what_is_wrong_with_a_batch_is_said_of_it(source):
    with torch.no_grad():
        next(source.lm.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="the model gives target 0 of window 5 log-prob nan"):
        next(source.stream(iter([np.array([5]), np.array([6])])))
    source.windows.corpus.manifest["vocab_size"] = 3  # a reader's error arrives too
    with pytest.raises(UserError, match="window 6 of .* holds token id"):
        next(source.stream(iter([np.array([6])])))


def test_weights_that_go_to_the_device_as_they_are_read(tmp_path, text_corpus, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    save_model(folder, new_model(LLAMA, 300, None), tokenizer, "card", {})
    words = {"device": "cpu", "dtype": "bfloat16"}
    direct = load_reference(str(folder), text_corpus, **words, direct=True)
    whole = load_reference(str(folder), text_corpus, **words)
    for one, other in zip(direct.parameters(), whole.parameters(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other)
    stores = [
        References.open(
            score(text_corpus, tmp_path / f"{way}", reference_model=folder, **words, direct=way)
        )
        for way in (True, False)
    ]
    assert stores[0].manifest["scoring"] == stores[1].manifest["scoring"] | {"direct": True}
    found = [np.array(store.column("logprobs", 0)[1:]) for store in stores]
    assert np.abs(found[0] - found[1]).max() < 0.05  # of 5.7 nats: positions are in float32
    with pytest.raises(UserError, match="direct is true, but it is for windows"):
        score(text_corpus, tmp_path / "d", reference_model=folder, layout="documents", direct=True)
