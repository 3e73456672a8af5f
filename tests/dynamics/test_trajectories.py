"""Losses of a token set against the model's own logits; the store of them."""

import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynamics_helpers import make_lm
from slm.dynamics.token_set import read_windows
from slm.dynamics.trajectories import TrajectoryStore, make_plan, remove_store, token_losses
from slm.errors import UserError, shown
from slm.store.files import write_record
from slm.store.windows import IGNORE_INDEX, Windows

RUN = {"seed": 0, "selection": {"rule": "all"}, "selection_start": 0, "micro_batch_size": 2}


def make_store(folder, corpus, numbers, tokenizer, run=RUN) -> TrajectoryStore:
    windows = Windows(corpus)
    tokens = read_windows(windows, numbers, tokenizer)
    return TrajectoryStore.create(folder, make_plan(windows, numbers, run, "float32"), tokens)


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
    live = (batch["targets"] != IGNORE_INDEX).numpy()
    assert live.sum() == 24 - 3  # documents begin at 3, 8 and 21
    assert np.isnan(found[~live]).all()
    np.testing.assert_allclose(found[live], losses.numpy()[live], rtol=1e-5, atol=1e-6)


# ---- the store ------------------------------------------------------------------------------


def test_store_grows_and_stays_in_order(tmp_path, text_corpus, tokenizer):
    numbers = np.array([1, 5])
    store = make_store(tmp_path / "d", text_corpus, numbers, tokenizer)
    for tokens in (300, 100, 200):
        store.append(tokens, np.full(32, tokens / 100))
    again = TrajectoryStore(tmp_path / "d")
    assert [c.tokens_seen for c in again.checkpoints] == [100, 200, 300]
    assert [column.tolist() for column in again.losses()] == [[1.0] * 32, [2.0] * 32, [3.0] * 32]
    assert again.tokens.windows.tolist() == [1, 5]
    assert again.has(200) and not again.has(250)
    again.forget_after(150)
    assert [c.tokens_seen for c in store.checkpoints] == [100]
    assert sorted(path.name for path in (tmp_path / "d").glob("losses-*.npy")) == [
        "losses-000000000000100.npy"
    ]


def test_what_a_killed_writer_left_is_removed(tmp_path, text_corpus, tokenizer):
    numbers = np.array([1, 5])
    store = make_store(tmp_path / "d", text_corpus, numbers, tokenizer)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = f".losses-000000000000100.npy.{socket.gethostname()}-{dead.pid}-123.tmp"
    (store.folder / name).write_bytes(b"half")
    before = sorted(path.name for path in store.folder.iterdir())
    make_store(tmp_path / "d", text_corpus, numbers, tokenizer)
    before.remove(name)
    assert sorted(path.name for path in store.folder.iterdir()) == before


def test_a_store_is_removed_and_nothing_else(tmp_path, text_corpus, tokenizer):
    make_store(tmp_path / "d", text_corpus, np.array([1, 5]), tokenizer).append(100, np.ones(32))
    for name in ("notes.txt", "table.csv"):
        (tmp_path / "d" / name).touch()
    remove_store(tmp_path / "d")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["notes.txt", "table.csv"]
    remove_store(tmp_path / "d")  # and what is no store
    remove_store(tmp_path / "nowhere")
    with pytest.raises(UserError, match="plan.json: kind is .*, expected 'dynamics'"):
        remove_store(text_corpus.folder)
    assert len(text_corpus.open(text_corpus.folder).shards) == 2


def test_what_does_not_belong_is_refused(tmp_path, text_corpus, tokenizer, make_corpus):
    numbers = np.array([0, 1])
    store = make_store(tmp_path / "d", text_corpus, numbers, tokenizer)
    store.append(10, np.ones(32))
    with pytest.raises(UserError, match="is about 32 tokens, 31 losses were found after 20"):
        store.append(20, np.ones(31))
    with pytest.raises(UserError, match="after 20 tokens the loss of token 3 is nan"):
        store.append(20, np.where(np.arange(32) == 3, np.nan, 1.0))
    with pytest.raises(UserError, match="windows_sha256 is"):
        make_store(tmp_path / "d", text_corpus, np.array([0, 2]), tokenizer)
    with pytest.raises(UserError, match="run is"):
        make_store(tmp_path / "d", text_corpus, numbers, tokenizer, RUN | {"seed": 1})
    other = make_corpus(tmp_path / "c", [np.arange(33)], 16)
    with pytest.raises(UserError, match="corpus_fingerprint is"):
        make_store(tmp_path / "d", other, numbers, tokenizer)
    with pytest.raises(UserError, match=r"holds no token losses \(plan.json is missing\)"):
        TrajectoryStore(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("selection_start", "0"),
        ("micro_batch_size", 0),
        ("micro_batch_size", None),
        ("selection", 3),
    ],
)
def test_a_plan_of_another_type_is_refused(tmp_path, text_corpus, tokenizer, name, value):
    path = tmp_path / "d" / "plan.json"
    plan = make_store(path.parent, text_corpus, np.array([0]), tokenizer).plan
    write_record(path, plan | {"run": plan["run"] | {name: value}})
    with pytest.raises(UserError, match=f"plan.json: {name} is {shown(value)}, expected "):
        TrajectoryStore(path.parent)
