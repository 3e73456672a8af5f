"""The token set against counting by hand, and what the corpus and its references say of it."""

import numpy as np
import pytest

from slm.dynamics.token_set import draw_windows, read_token_set, read_windows, write_token_set
from slm.errors import UserError
from slm.store.windows import IGNORE_INDEX, Windows

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


# ---- what is known of them ------------------------------------------------------------------


def test_columns_stand_beside_their_targets(tmp_path, make_corpus, make_references, tokenizer):
    corpus = make_corpus(tmp_path / "c", [np.arange(33) + 40], 8, "documents", [[0, 3, 8, 21]])
    scores = np.linspace(-5, -1, 33, dtype=np.float32)
    references = make_references(tmp_path / "r", corpus, [scores])
    windows = Windows(corpus, [references])
    numbers = np.array([0, 2, 3])
    tokens = read_windows(windows, numbers, tokenizer)
    batch = windows.batch(numbers)
    live = batch["targets"].numpy() != IGNORE_INDEX
    np.testing.assert_array_equal(tokens.live, live)
    np.testing.assert_array_equal(tokens.targets, batch["targets"].numpy()[live])
    expected = -batch["reference_logprob"].numpy()[live]
    np.testing.assert_array_equal(tokens.columns["reference_loss"], expected)
    np.testing.assert_array_equal(tokens.columns["source"], windows.sources(numbers)[live])
    text = b"".join(tokens.pieces[int(token)] for token in tokens.targets).decode()
    assert text == tokenizer.decode(tokens.targets.tolist())
    grid = tokens.spread(tokens.columns["reference_loss"])
    np.testing.assert_array_equal(grid[live], expected)
    assert np.isnan(grid[~live]).all()
    tmp = tmp_path / "set"
    tmp.mkdir()
    write_token_set(tmp, tokens)
    again = read_token_set(tmp)
    assert again.pieces == tokens.pieces and again.columns.keys() == tokens.columns.keys()
    for name, column in tokens.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)
    for name in ("windows", "tokens", "live"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tokens, name))


def test_labels_stand_beside_their_targets(tmp_path, make_corpus, tokenizer):
    """Live targets alone; token t is labelled t % 3 - 1."""
    ids = np.arange(33) + 40
    masks, signal = [(ids % 7 > 1).tolist()], [(ids % 3 - 1).tolist()]
    corpus = make_corpus(tmp_path / "c", [ids], 8, masks=masks, signal=signal)
    tokens = read_windows(Windows(corpus), np.array([1, 3]), tokenizer)
    assert tokens.columns["signal"].dtype == np.int8
    assert tokens.columns["signal"].tolist() == [int(t) % 3 - 1 for t in tokens.targets]
    assert tokens.num_targets == len(tokens.columns["signal"]) < 16
    (tmp_path / "set").mkdir()
    write_token_set(tmp_path / "set", tokens)
    again = read_token_set(tmp_path / "set").columns["signal"]
    assert again.tolist() == tokens.columns["signal"].tolist()


def test_windows_without_a_target_are_refused(tmp_path, make_corpus, tokenizer):
    masks = [[False] * 17]
    corpus = make_corpus(tmp_path / "c", [np.arange(17)], 8, masks=masks)
    with pytest.raises(UserError, match="the 2 windows have no target"):
        read_windows(Windows(corpus), np.array([0, 1]), tokenizer)
