"""Folders as rows: shifted by one, every value is that of the batch of the same window."""

import numpy as np
import pytest
import torch
from datasets import List, Value
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slm.integrations.datasets import to_hf_dataset
from slm.store.windows import IGNORE_INDEX, Windows


@pytest.mark.parametrize("combine", [None, "mean", "mixture"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_a_row_shifted_by_one_is_the_window(folders, packing, masked, combine):
    corpus, stores = folders(packing, masked)
    stores = stores if combine else stores[:1]
    made = to_hf_dataset(corpus.folder, [store.folder for store in stores], combine=combine)
    rows = made.with_format("numpy")
    batch = Windows(corpus, stores, combine).batch(np.arange(5))
    assert len(rows) == 5
    labels, scores = np.array(rows["labels"]), np.array(rows["reference_logprob"])
    assert np.array_equal(labels[:, 1:], batch["targets"])
    assert (labels[:, 0] == IGNORE_INDEX).all()
    ids = np.array(rows["input_ids"])
    assert np.array_equal(ids[:, :-1], batch["input_ids"])
    assert ids.tolist() == [[*range(s, s + 5)] for s in (0, 4, 8, 100, 104)]
    live = batch["targets"].numpy() != IGNORE_INDEX
    assert np.array_equal(np.isnan(scores), labels == IGNORE_INDEX)
    assert np.array_equal(scores[:, 1:][live], batch["reference_logprob"].numpy()[live])
    if combine is None:  # token x of the text has the score -x / 7
        assert np.allclose(-7 * scores[:, 1:][live], ids[:, 1:][live])
    if packing == "documents":
        expected = [[3, 2], [4, 1], [4, 1], [2, 2, 1], [5]]
        assert [row.tolist() for row in rows["seq_lengths"]] == expected
        restarts = [[i for n in lengths for i in range(n)][:4] for lengths in expected]
        assert restarts == batch["position_ids"].tolist()
    assert ("seq_lengths" in made.column_names) == (packing == "documents")


def test_trl_restarts_positions_at_documents(folders):
    """Its collator flattens rows and reads `seq_lengths`; the inputs are those of the windows."""
    corpus, stores = folders("documents", True)
    rows = [dict(row) for row in to_hf_dataset(corpus.folder, stores[0].folder)]
    found = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    batch = Windows(corpus).batch(np.arange(5))
    assert torch.equal(found["position_ids"].view(5, 5)[:, :-1], batch["position_ids"])
    assert torch.equal(found["labels"].view(5, 5)[:, 1:], batch["targets"])


def test_columns_are_typed_and_there_by_need(folders):
    corpus, stores = folders("documents", True)
    plain = to_hf_dataset(corpus.folder)
    assert plain.features == {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int64")),
        "seq_lengths": List(Value("int32")),
    }
    scored = to_hf_dataset(corpus.folder, stores[0].folder)
    assert scored.features == {**plain.features, "reference_logprob": List(Value("float32"))}


def test_windows_of_many_batches_are_in_order(tmp_path, make_corpus, monkeypatch):
    monkeypatch.setattr("slm.integrations.datasets.windows.WINDOWS_AT_ONCE", 3)
    corpus = make_corpus(tmp_path / "c", [np.arange(41), np.arange(50, 71)], 4)
    rows = to_hf_dataset(corpus.folder)["input_ids"]
    assert [row[0] for row in rows] == [*range(0, 40, 4), *range(50, 70, 4)]
