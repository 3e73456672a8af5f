"""What the stored losses say, against counting by hand on a small store."""

import numpy as np
import pytest

from slm.dynamics.analysis import Chooser, analyse, run_chooser, shares_of
from slm.dynamics.classes import CLASSES, RunningFit, classify
from slm.dynamics.token_set import TokenSet, read_windows
from slm.dynamics.trajectories import TrajectoryStore, make_plan
from slm.errors import UserError
from slm.selection import Excess
from slm.store.windows import Windows

EXCESS = {"_target_": "slm.selection.Excess", "select_ratio": 0.5, "scope": "batch"}


@pytest.fixture
def make_store(tmp_path, make_corpus, make_references, tokenizer):
    """Four windows of 8 over two sources; the reference loss of target i is i / 10."""

    def make(
        selection=EXCESS, start=0, references=True, micro_batch_size=2, signal=None, folder="d"
    ) -> TrajectoryStore:
        root, ids = tmp_path / f"of_{folder}", [np.arange(33) + 40]
        corpus = make_corpus(root / "c", ids, 8, starts=[[0, 17]], signal=signal)
        rows = np.load(corpus.folder / "documents-00000.npy")
        rows[:, 1] = [0, 1]
        np.save(corpus.folder / "documents-00000.npy", rows)
        stores = [make_references(root / "r", corpus, [-np.arange(33) / 10 + 0.1])]
        windows = Windows(corpus, stores if references else [])
        numbers = np.arange(4)
        run = {
            "selection": selection,
            "seed": 0,
            "selection_start": start,
            "micro_batch_size": micro_batch_size,
        }
        plan = make_plan(windows, numbers, run, "float32") | {"sources": ["a", "b"]}
        tokens = read_windows(windows, numbers, tokenizer)
        return TrajectoryStore.create(tmp_path / folder, plan, tokens)

    return make


def losses_of(checkpoints: int, tokens: int = 32) -> np.ndarray:  # (C, M)
    rng = np.random.default_rng(0)
    start, slope = rng.uniform(0, 6, tokens), rng.uniform(-0.6, 0.6, tokens)
    noise = rng.normal(0, 0.1, (checkpoints, tokens))
    found = start + np.arange(checkpoints)[:, None] * slope / 4 + noise
    return np.abs(found).astype(np.float32)


def filled(store: TrajectoryStore, losses: np.ndarray) -> TrajectoryStore:
    for index, column in enumerate(losses):
        store.append(100 * index, column)
    return store


def test_keep_rates_of_signal_and_noise_are_counted_by_hand(make_store):
    label = np.tile(np.array([1, 0, 1, -1, 1], np.int8), 7)[:33]
    store = filled(make_store(signal=[label.tolist()]), losses_of(4))
    found = analyse(store, "run")
    assert found.kept is not None and found.chooser is not None
    for index, column in enumerate(store.losses()):
        mask = found.chooser.selected(column, 100 * index)
        for number in (0, 1):  # target i is the token at i + 1
            mine = [bool(mask[i]) for i in range(32) if label[i + 1] == number]
            assert found.kept.by_signal[index, number] == pytest.approx(sum(mine) / len(mine))
    bare = analyse(filled(make_store(folder="bare"), losses_of(4)), "run")
    assert bare.kept is not None and np.isnan(bare.kept.by_signal).all()


def test_every_number_is_counted_by_hand(make_store):
    losses = losses_of(6)
    store = filled(make_store(), losses)
    found = analyse(store, "run")
    label = found.trajectories.label
    assert found.mean_loss == pytest.approx(losses[-1].mean(dtype=np.float64))
    np.testing.assert_allclose(found.mean_losses, losses.mean(1, dtype=np.float64))
    reference = np.arange(32) / 10
    source = np.array([0] * 16 + [1] * 16)
    assert found.kept is not None
    times = np.zeros(32, int)
    for index, column in enumerate(losses):
        excess = column.astype(np.float64) - reference
        mask = np.zeros(32, bool)
        order = np.random.Generator(np.random.PCG64(0)).permutation(4)
        assert order.tolist() != [0, 1, 2, 3]
        for pair in (order[:2], order[2:]):  # two windows of 8 are ranked together
            rows = (pair[:, None] * 8 + np.arange(8)).ravel()
            mask[rows] = excess[rows] > np.sort(excess[rows])[7]
        assert mask.sum() == 16
        times += mask
        for number in range(len(CLASSES)):
            mine = label == number
            if not mine.any():
                assert np.isnan(found.kept.by_class[index, number])
                continue
            assert found.kept.by_class[index, number] == pytest.approx(mask[mine].mean())
            assert found.class_losses[index, number] == pytest.approx(column[mine].mean(), rel=1e-6)
        for number in range(2):
            rate = mask[source == number].mean()
            assert found.kept.by_source[index, number] == pytest.approx(rate)
        assert found.kept.loss_selected[index] == pytest.approx(column[mask].mean(), rel=1e-6)
        assert found.kept.loss_unselected[index] == pytest.approx(column[~mask].mean(), rel=1e-6)
    np.testing.assert_array_equal(found.kept.times, times)
    excess_loss = found.excess_loss(2)
    assert excess_loss is not None
    np.testing.assert_allclose(excess_loss, losses[2] - reference, rtol=1e-5, atol=1e-6)


def test_sources_beside_each_other_are_ranked_together_as_in_training(tmp_path):
    """Batches in the stored order would be of one source each, and keep half of both."""
    windows, length = 64, 16
    live = np.ones((windows, length), bool)
    source = np.repeat([0, 1], windows * length // 2).astype(np.uint16)
    rng = np.random.default_rng(0)
    excess_loss = rng.normal(0, 1, len(source)) + 1.5 * source
    tokens = TokenSet(
        np.arange(windows),
        np.zeros((windows, length + 1), np.uint32),
        live,
        {"source": source, "reference_loss": np.full(len(source), 5, np.float32)},
        {0: b"a"},
    )
    mask = Chooser("excess", tokens, Excess(0.5), batch_size=16).selected(excess_loss + 5, 0)
    assert mask.mean() == 0.5
    together = excess_loss > np.sort(excess_loss)[len(source) // 2 - 1]
    for index in (0, 1):
        expected = together[source == index].mean()
        assert mask[source == index].mean() == pytest.approx(expected, abs=0.06)
        assert abs(expected - 0.5) > 0.2


@pytest.mark.parametrize(
    "target", ["os.getcwd", "not_installed.Rule", "slm.selection.rules.Nothing"]
)
def test_a_rule_that_is_none_is_not_called(make_store, target):
    found = analyse(filled(make_store({"_target_": target}), losses_of(3)), "run")
    assert found.kept is None and found.chooser is None


def test_a_run_that_goes_on_meanwhile_does_no_harm(make_store, monkeypatch):
    store, losses = make_store(), losses_of(4)
    filled(store, losses[:3])

    def slow(columns, *rest):
        store.append(300, losses[3])  # while the others are classified
        return classify(columns, *rest)

    monkeypatch.setattr("slm.dynamics.analysis.classify", slow)
    assert analyse(store, "run").tokens_seen.tolist() == [0, 100, 200]


def test_the_shares_so_far_are_those_of_the_checkpoints_so_far(make_store):
    losses = losses_of(7)
    found = analyse(filled(make_store(), losses), "run")
    assert np.isnan(found.share_history[:2]).all()
    for count in range(3, 8):
        expected = shares_of(classify(list(losses[:count])).label)
        np.testing.assert_allclose(found.share_history[count - 1], expected)
    final = [found.shares[name].share for name in CLASSES]
    np.testing.assert_allclose(found.share_history[-1], final)


@pytest.mark.parametrize("mean_loss", [None, 2.5])
def test_running_labels_are_the_fits(mean_loss):
    losses = losses_of(12, tokens=5000)
    fit = RunningFit(0.3, mean_loss)
    for count, column in enumerate(losses, start=1):
        fit.add(column)
        assert fit.is_ready == (count >= 3)
        if fit.is_ready:
            expected = classify(list(losses[:count]), 0.3, mean_loss).label
            np.testing.assert_array_equal(fit.labels(), expected)


def test_until_the_rule_starts_every_token_is_kept(make_store):
    found = analyse(filled(make_store(start=250), losses_of(5)), "run")
    assert found.kept is not None
    rates = np.nanmean(found.kept.by_source, 1)
    assert rates[:3].tolist() == [1, 1, 1] and rates[3:].tolist() == [0.5, 0.5]
    assert np.isnan(found.kept.loss_unselected[:3]).all()


def test_a_global_rule_ranks_the_frozen_windows_once(make_store):
    store = filled(make_store(EXCESS | {"scope": "global"}, micro_batch_size=4), losses_of(3))
    chooser = run_chooser(store)
    assert chooser is not None and chooser.rule.scope == "batch"
    assert chooser.selected(store.losses()[0], 0).sum() == 16


def test_without_the_scores_there_are_no_keep_rates(make_store):
    found = analyse(filled(make_store(references=False), losses_of(3)), "run")
    assert found.kept is None and found.chooser is None and found.excess_loss(0) is None


def test_rules_without_references_have_keep_rates(make_store):
    random = {"_target_": "slm.selection.Random", "select_ratio": 0.25, "scope": "batch", "seed": 1}
    found = analyse(filled(make_store(random, references=False), losses_of(3)), "run")
    assert found.kept is not None and found.kept.rule == "random k = 0.25"
    np.testing.assert_allclose(np.nanmean(found.kept.by_source), 0.25)


def test_uneven_checkpoints_are_noticed(make_store):
    store = make_store()
    for seen, column in zip((0, 100, 200), losses_of(3), strict=True):
        store.append(seen, column)
    assert not analyse(store, "run").uneven
    store.append(1000, losses_of(1)[0])
    assert analyse(store, "run").uneven


def test_two_checkpoints_are_too_few(make_store):
    with pytest.raises(UserError, match="2 checkpoints have token losses, a trajectory needs 3"):
        analyse(filled(make_store(), losses_of(2)), "run")
