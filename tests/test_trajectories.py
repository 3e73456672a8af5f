"""The token set against counting by hand, its losses against the model's own logits, the store."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slm.data import IGNORE_INDEX, Windows
from slm.errors import UserError
from slm.model import SelectiveLM, new_model
from slm.trajectories import TrajectoryStore, draw_windows, token_losses

RUN = {"fingerprint": "run"}


def make_lm() -> SelectiveLM:
    torch.manual_seed(0)
    fields = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attention_dropout": 0.5,
    }
    return SelectiveLM(new_model(fields, 300, None)).train()


# ---- which tokens ---------------------------------------------------------------------------


def test_whole_windows_until_there_are_enough_targets(tmp_path, make_corpus):
    # Windows of 4: all documents of one token in the first half, so that half of it is no target.
    starts = [[*range(17), 17]]
    corpus = make_corpus(tmp_path / "c", [np.arange(41)], 4, "documents", starts)
    windows = Windows(corpus)
    live = [
        (windows.batch(np.array([i]))["targets"] != IGNORE_INDEX).sum().item() for i in range(10)
    ]
    assert live == [0, 0, 0, 0, 3, 4, 4, 4, 4, 4]
    for wanted in (1, 4, 9, 23):
        chosen = draw_windows(windows, wanted, seed=3, by_source=False)
        assert (np.diff(chosen) > 0).all()
        total = sum(live[i] for i in chosen)
        assert wanted <= total < wanted + 4
    assert draw_windows(windows, 10**6, seed=3, by_source=False).tolist() == list(range(10))
    one, other = (draw_windows(windows, 9, seed=seed, by_source=False) for seed in (0, 1))
    assert one.tolist() != other.tolist()
    again = draw_windows(windows, 9, seed=0, by_source=False)
    assert one.tolist() == again.tolist()


def test_sources_in_turn_give_a_rare_one_its_windows(tmp_path, make_corpus):
    corpus = make_corpus(tmp_path / "c", [np.arange(161) % 290], 4, starts=[[0, 144]])
    path = corpus.folder / "documents-00000.npy"
    rows = np.load(path)
    rows[:, 1] = [0, 1]  # 36 windows of the first source, 4 of the second
    np.save(path, rows)
    windows = Windows(corpus)
    chosen = draw_windows(windows, 6 * 4, seed=0, by_source=True)
    assert len(chosen) == 6 and (chosen >= 36).sum() == 3
    chosen = draw_windows(windows, 20 * 4, seed=0, by_source=True)
    assert (chosen >= 36).sum() == 4  # all that there are


# ---- their losses ---------------------------------------------------------------------------


def test_losses_are_those_of_the_models_own_logits(tmp_path, make_corpus):
    starts = [[0, 3, 8, 21]]
    corpus = make_corpus(tmp_path / "c", [np.arange(33)], 8, "documents", starts)
    windows, lm = Windows(corpus), make_lm()
    numbers = np.array([0, 2, 3])
    state = torch.get_rng_state()
    found = token_losses(lm, windows, numbers, batch_size=2)
    assert lm.training and torch.equal(state, torch.get_rng_state())
    batch = windows.batch(numbers)
    lm.eval()
    with torch.no_grad():
        inputs = {"position_ids": batch["position_ids"], "use_cache": False}
        logits = lm.model(batch["input_ids"], **inputs).logits
    losses = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
    expected = losses[batch["targets"] != IGNORE_INDEX]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert len(found) == 24 - 3  # documents begin at 3, 8 and 21


# ---- the store ------------------------------------------------------------------------------


def test_store_grows_and_stays_in_order(tmp_path, text_corpus):
    numbers = np.array([1, 5])
    store = TrajectoryStore.create(tmp_path / "d", text_corpus, numbers, RUN)
    for tokens in (300, 100, 200):
        store.append(tokens, np.full(32, tokens / 100))
    again = TrajectoryStore(tmp_path / "d")
    assert [c.tokens_seen for c in again.checkpoints] == [100, 200, 300]
    assert [column.tolist() for column in again.losses()] == [[1.0] * 32, [2.0] * 32, [3.0] * 32]
    assert again.windows.tolist() == [1, 5]
    assert again.has(200) and not again.has(250)
    again.forget_after(150)
    assert [c.tokens_seen for c in store.checkpoints] == [100]
    assert sorted(path.name for path in (tmp_path / "d").glob("losses-*.npy")) == [
        "losses-000000000000100.npy"
    ]


def test_a_flipped_byte_is_found(tmp_path, text_corpus):
    store = TrajectoryStore.create(tmp_path / "d", text_corpus, np.array([0]), RUN)
    store.append(10, np.ones(16))
    store.append(20, np.ones(16))
    assert store.damaged() == []
    data = bytearray(store.path(20).read_bytes())
    data[-1] ^= 1
    store.path(20).write_bytes(data)
    assert store.damaged() == [store.path(20)]


def test_what_does_not_belong_is_refused(tmp_path, text_corpus, make_corpus):
    numbers = np.array([0, 1])
    store = TrajectoryStore.create(tmp_path / "d", text_corpus, numbers, RUN)
    store.append(10, np.ones(32))
    with pytest.raises(UserError, match="has losses of 32 tokens, 31 were found after 20"):
        store.append(20, np.ones(31))
    with pytest.raises(UserError, match="after 20 tokens the loss of token 3 is nan"):
        store.append(20, np.where(np.arange(32) == 3, np.nan, 1.0))
    with pytest.raises(UserError, match="windows_sha256 is"):
        TrajectoryStore.create(tmp_path / "d", text_corpus, np.array([0, 2]), RUN)
    with pytest.raises(UserError, match="run is"):
        TrajectoryStore.create(tmp_path / "d", text_corpus, numbers, {"fingerprint": "other"})
    other = make_corpus(tmp_path / "c", [np.arange(33)], 16)
    with pytest.raises(UserError, match="corpus_fingerprint is"):
        TrajectoryStore.create(tmp_path / "d", other, numbers, RUN)
    with pytest.raises(UserError, match=r"holds no token losses \(plan.json is missing\)"):
        TrajectoryStore(tmp_path / "nothing")
