"""Folders as rows and as a torch dataset: every value is that of the batch of the same window."""

import numpy as np
import pytest
import torch
from datasets import List, Value
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slm.data import IGNORE_INDEX, Windows
from slm.errors import UserError
from slm.integrations.datasets import WindowDataset, to_hf_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path, make_corpus, make_references):
    """Two shards of 3 and 2 windows of 4; two references; prompts; by wish documents."""

    def make(packing: str, masked: bool):
        shards = [np.arange(0, 13), np.arange(100, 109)]
        masks = [[int(token) % 5 != 1 for token in tokens] for tokens in shards]
        starts = [[0, 3, 8, 12], [0, 2, 4]]  # at a window's end, inside, and at its first token
        corpus = make_corpus(
            tmp_path / "c", shards, 4, packing, starts, masks=masks if masked else None
        )
        scores = [np.r_[np.nan, -shard[1:] / 7] for shard in shards]
        stores = [
            make_references(tmp_path / f"r{i}", corpus, [factor * s for s in scores])
            for i, factor in enumerate((1.0, 3.0))
        ]
        return corpus, stores

    return make


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


def test_the_cache_is_by_content(folders):
    """The same folders are read once, whatever they are called; other scores are other rows."""
    corpus, stores = folders("concat", False)
    one = to_hf_dataset(corpus.folder, stores[0].folder)
    moved = corpus.folder.rename(corpus.folder.with_name("moved"))
    again = to_hf_dataset(moved, stores[0].folder)
    assert again.cache_files == one.cache_files
    other = to_hf_dataset(moved, stores[1].folder)
    first = [rows["reference_logprob"][0][1] for rows in (one, other)]
    assert first == pytest.approx([-1 / 7, -3 / 7])
    both = [store.folder for store in stores]
    lowest, highest = (to_hf_dataset(moved, both, combine=how) for how in ("max", "min"))
    first = [rows["reference_logprob"][0][1] for rows in (lowest, highest)]
    assert first == pytest.approx([-3 / 7, -1 / 7])


def test_windows_of_many_batches_are_in_order(tmp_path, make_corpus, monkeypatch):
    monkeypatch.setattr("slm.integrations.dataset_windows.WINDOWS_AT_ONCE", 3)
    corpus = make_corpus(tmp_path / "c", [np.arange(41), np.arange(50, 71)], 4)
    rows = to_hf_dataset(corpus.folder)["input_ids"]
    assert [row[0] for row in rows] == [*range(0, 40, 4), *range(50, 70, 4)]


def test_what_windows_refuse_is_said_as_they_say_it(
    tmp_path, folders, make_corpus, make_references
):
    corpus, stores = folders("concat", False)
    other = make_corpus(tmp_path / "other", [np.arange(13)[::-1]], 4)
    for door in (to_hf_dataset, WindowDataset):
        with pytest.raises(UserError, match=f"{corpus.fingerprint}.*{other.fingerprint}"):
            door(other.folder, stores[0].folder)
        with pytest.raises(UserError, match="^references names 2 folders: combine must be one of"):
            door(corpus.folder, [store.folder for store in stores])
    scores = np.r_[np.nan, -np.ones(12)]
    scores[6] = np.nan
    broken = make_references(tmp_path / "broken", other, [scores])
    with pytest.raises(UserError, match="target 1 of window 1 has log-prob nan"):
        to_hf_dataset(other.folder, broken.folder)
    with pytest.raises(UserError, match="target 1 of window 1 has log-prob nan"):
        WindowDataset(other.folder, broken.folder)[1]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_a_loader_gives_the_batches_of_windows(folders, packing, num_workers):
    corpus, stores = folders(packing, True)
    windows = WindowDataset(corpus.folder, [str(s.folder) for s in stores], "mean")
    assert len(windows) == 5
    windows[0]  # a map that is open is not sent to the workers
    batches = list(DataLoader(windows, batch_size=2, num_workers=num_workers))
    assert [len(batch["targets"]) for batch in batches] == [2, 2, 1]
    expected = Windows(corpus, stores, "mean").batch(np.arange(5))
    names = {"input_ids", "targets", "reference_logprob"}
    assert batches[0].keys() == names | ({"position_ids"} if packing == "documents" else set())
    for name in batches[0]:
        found = torch.cat([batch[name] for batch in batches])
        assert torch.equal(found.nan_to_num(7), expected[name].nan_to_num(7)), name


def test_windows_beyond_the_last_end_an_iteration(folders):
    corpus, _ = folders("concat", False)
    windows = WindowDataset(corpus.folder)
    assert [item["input_ids"][0].item() for item in windows] == [0, 4, 8, 100, 104]
    with pytest.raises(IndexError, match="window 5 of 5"):
        windows[5]
