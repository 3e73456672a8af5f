"""Folders as a torch dataset: every value is that of the batch; what the cache goes by."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from slm.errors import UserError
from slm.integrations.datasets import WindowDataset, to_hf_dataset
from slm.store.windows import Windows


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


def test_a_stock_model_keeps_documents_apart_without_a_cache(tmp_path, make_corpus):
    """The call that the docstring gives, against each document by itself, in float64."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, 33)
    corpus = make_corpus(tmp_path / "c", [tokens], 16, "documents", [[0, 5, 19]])
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # so that what stands before a token matters
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double()
    batch = next(iter(DataLoader(WindowDataset(corpus.folder), batch_size=2)))

    def loss(logits: torch.Tensor) -> float:
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item()

    apart = torch.zeros(2, 16, 50, dtype=torch.float64)
    for row, start, end in [(0, 0, 5), (0, 5, 16), (1, 0, 3), (1, 3, 16)]:
        apart[row, start:end] = model(batch["input_ids"][row : row + 1, start:end]).logits[0]
    assert (batch["targets"] == -100).nonzero().tolist() == [[0, 4], [1, 2]]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    assert loss(model(**inputs, use_cache=False).logits) == pytest.approx(loss(apart), rel=1e-12)
    across = loss(model(batch["input_ids"], use_cache=False).logits)
    assert across != pytest.approx(loss(apart), rel=1e-4)


def test_windows_beyond_the_last_end_an_iteration(folders):
    corpus, _ = folders("concat", False)
    windows = WindowDataset(corpus.folder)
    assert [item["input_ids"][0].item() for item in windows] == [0, 4, 8, 100, 104]
    with pytest.raises(IndexError, match="window 5 of 5"):
        windows[5]
