"""Separation against all pairs and against sorting by hand; rows of a small store."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.dynamics.analysis import analyse
from slm.dynamics.token_set import read_windows
from slm.dynamics.trajectories import TrajectoryStore, make_plan
from slm.dynamics.truth import RATIOS, auc, kept_rows, precision_at, separation, truth_rows
from slm.store.files import write_csv
from slm.store.windows import Windows

EXCESS = {"_target_": "slm.selection.Excess", "select_ratio": 0.5, "scope": "batch"}
RANDOM = {"_target_": "slm.selection.Random", "select_ratio": 0.5, "scope": "batch", "seed": 3}


def auc_of_pairs(score, signal) -> float:
    """The definition: every token of signal against every token of noise."""
    pairs = [(a, b) for a in score[signal] for b in score[~signal]]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def precision_by_hand(score, signal, ratio) -> float:
    count = max(1, int(np.floor(ratio * len(score) + 0.5)))
    chosen = sorted(range(len(score)), key=lambda i: (-score[i], i))[:count]
    return sum(bool(signal[i]) for i in chosen) / count


SCORES = st.lists(
    st.tuples(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0]) | st.floats(-9, 9), st.booleans()),
    min_size=2,
    max_size=40,
).filter(lambda rows: len({label for _, label in rows}) == 2)


@settings(max_examples=300, deadline=None)
@given(SCORES, st.floats(0.01, 1))
def test_separation_is_that_of_all_pairs(rows, ratio):
    score, signal = np.array([s for s, _ in rows]), np.array([t for _, t in rows])
    found = separation(score, signal, [ratio])
    assert found.auc == pytest.approx(auc_of_pairs(score, signal), abs=1e-12)
    assert found.precision == pytest.approx((precision_by_hand(score, signal, ratio),))


def test_ends_of_the_scale():
    signal = np.array([True, False, True, False])
    assert auc(np.array([3.0, 1, 2, 0]), signal) == 1
    assert auc(np.array([0.0, 1, 0.5, 3]), signal) == 0
    assert auc(np.ones(4), signal) == 0.5
    assert precision_at(np.ones(4), signal, [0.25, 0.5, 0.75, 1]) == [1, 0.5, 2 / 3, 0.5]


def test_many_tokens_are_counted_exactly():
    """2 * wins needs 10**11; a sum in float32 would be off in the fourth digit."""
    rng = np.random.default_rng(0)
    score = rng.integers(0, 50, 400_000).astype(np.float32)
    signal = rng.random(400_000) < 0.3 + score / 200
    counts = [np.bincount(score[signal == s].astype(int), minlength=50).tolist() for s in (1, 0)]
    wins = sum(
        h * m * (2 if a > b else a == b)
        for a, h in enumerate(counts[0])
        for b, m in enumerate(counts[1])
    )
    assert auc(score, signal) == wins / (2 * sum(counts[0]) * sum(counts[1]))


# ---- rows of a run ------------------------------------------------------------------------------


@pytest.fixture
def make_analysis(tmp_path, make_corpus, make_references, tokenizer):
    """Eight windows of 8; 64 targets, some of them prompts; three checkpoints."""
    rng = np.random.default_rng(5)
    logprobs, entropy = -rng.gamma(2, 1, 65), rng.gamma(3, 1, 65)
    losses = rng.gamma(2, 1.5, (3, 64)).astype(np.float32)

    def make(label, selection=EXCESS, references=True, with_entropy=True):
        signal = None if label is None else [label.tolist()]
        masks = [(np.arange(65) % 9 > 0).tolist()]
        ids = [np.arange(65) + 30]
        corpus = make_corpus(tmp_path / "c", ids, 8, masks=masks, signal=signal)
        extra = [[entropy]] if with_entropy else []
        stores = [make_references(tmp_path / "r", corpus, [logprobs], *extra)]
        windows = Windows(corpus, stores if references else [])
        tokens = read_windows(windows, np.arange(8), tokenizer)
        run = {"seed": 0, "selection": selection, "selection_start": 0, "micro_batch_size": 4}
        plan = make_plan(windows, np.arange(8), run, "float32")
        store = TrajectoryStore.create(tmp_path / "d", plan, tokens)
        live = np.arange(1, 65) % 9 > 0
        for index, column in enumerate(losses):
            store.append(1000 * index, column[live])
        columns = {
            "reference_loss": -logprobs[1:][live].astype(np.float32),
            "reference_entropy": entropy[1:][live].astype(np.float32),
        }
        return analyse(store, "a run"), losses[:, live], columns, live

    return make


LABEL = np.random.default_rng(1).choice([-1, 0, 1], 65, p=[0.2, 0.3, 0.5]).astype(np.int8)


def test_rows_are_counted_by_hand(make_analysis, tmp_path):
    analysis, losses, columns, live = make_analysis(LABEL)
    label = LABEL[1:][live]
    known = label != -1
    signal = label[known] == 1
    rows, scores = truth_rows(analysis), {}
    assert len(rows) == 3 * 5
    for row in rows:
        loss = losses[row["tokens_seen"] // 1000]
        scores = {
            "excess_loss": loss - columns["reference_loss"],
            "token_loss": loss,
            "reference_loss": -columns["reference_loss"],
            "reference_entropy": -columns["reference_entropy"],
        }
        assert (row["num_signal"], row["num_noise"]) == (signal.sum(), (~signal).sum())
        assert row["base_rate"] == pytest.approx(signal.mean())
        assert row["run"] == "a run"
        if row["score"] != "random":
            score = scores[row["score"]][known]
            assert row["auc"] == pytest.approx(auc_of_pairs(score, signal))
            for ratio in RATIOS:
                expected = precision_by_hand(score, signal, ratio)
                assert row[f"precision_at_{ratio}"] == pytest.approx(expected)
    by_score = {name: [r["auc"] for r in rows if r["score"] == name] for name in scores}
    assert len(set(by_score["token_loss"])) == len(set(by_score["excess_loss"])) == 3
    assert len(set(by_score["reference_loss"])) == len(set(by_score["reference_entropy"])) == 1
    write_csv(tmp_path / "truth.csv", rows)
    with open(tmp_path / "truth.csv") as file:
        assert [float(row["auc"]) for row in csv.DictReader(file)] == [row["auc"] for row in rows]


def test_sources_are_judged_apart(make_analysis):
    analysis, losses, columns, live = make_analysis(LABEL)
    label = LABEL[1:][live]
    source = np.arange(len(label)) // 20
    store = analysis.store
    store.tokens.columns["source"] = source.astype(np.uint16)
    store.plan["sources"] = [f"s{index}" for index in range(source.max() + 1)]
    rows = truth_rows(analysis)
    expected = {"all"}
    for index in range(source.max() + 1):
        mine = (source == index) & (label != -1)
        signal = label[mine] == 1
        if signal.any() and not signal.all():
            expected.add(f"s{index}")
            (row,) = (
                row
                for row in rows
                if (row["part"], row["score"], row["tokens_seen"])
                == (f"s{index}", "token_loss", 1000)
            )
            assert row["auc"] == pytest.approx(auc_of_pairs(losses[1][mine], signal))
            assert (row["num_signal"], row["num_noise"]) == (signal.sum(), (~signal).sum())
    assert {row["part"] for row in rows} == expected and len(expected) > 2


def test_random_ranks_as_the_control_does(make_analysis):
    """Over windows that are ranked together, precision is the rule's own, read off its mask."""
    label = np.where(LABEL == -1, 0, LABEL)  # all known
    rule = RANDOM | {"seed": 3}
    analysis, *_ = make_analysis(label, rule)
    assert analysis.chooser is not None
    analysis.chooser.batch_size = 8
    mask = analysis.chooser.selected(analysis.losses[0], 0)
    signal = analysis.tokens.columns["signal"] == 1
    (row,) = [r for r in truth_rows(analysis, [0.5], seed=3)[:5] if r["score"] == "random"]
    assert row["precision_at_0.5"] == pytest.approx(signal[mask].mean())
    (other,) = [r for r in truth_rows(analysis, [0.5], seed=4)[:5] if r["score"] == "random"]
    assert other["auc"] != row["auc"]


def test_scores_that_are_not_there_have_no_rows(make_analysis):
    rows = truth_rows(make_analysis(LABEL, RANDOM, references=False)[0])
    assert {row["score"] for row in rows} == {"token_loss", "random"}
    assert len(rows) == 6


def test_without_entropy(make_analysis):
    scores = {row["score"] for row in truth_rows(make_analysis(LABEL, with_entropy=False)[0])}
    assert scores == {"excess_loss", "token_loss", "reference_loss", "random"}


@pytest.mark.parametrize("label", [None, np.full(65, -1), np.ones(65, int), np.zeros(65, int)])
def test_without_both_kinds_there_is_nothing_to_tell_apart(make_analysis, label):
    analysis = make_analysis(label)[0]
    assert truth_rows(analysis) == kept_rows(analysis) == []


def test_what_the_rule_keeps_is_counted_by_hand(make_analysis):
    analysis, losses, columns, live = make_analysis(LABEL)
    label = LABEL[1:][live]
    window = np.repeat(np.arange(8), 8)[live]
    rows = kept_rows(analysis)
    assert [row["tokens_seen"] for row in rows] == [0, 1000, 2000]
    for row, loss in zip(rows, losses, strict=True):
        excess, mask = loss - columns["reference_loss"], np.zeros(len(label), bool)
        order = np.random.Generator(np.random.PCG64(0)).permutation(8)
        for part in (order[:4], order[4:]):  # ranked together, unknown tokens among them
            mine = np.flatnonzero(np.isin(window, part))
            best = sorted(mine, key=lambda i: -excess[i])
            mask[best[: int(len(mine) * 0.5 + 0.5)]] = True
        assert row["kept_of_signal"] == pytest.approx(mask[label == 1].mean())
        assert row["kept_of_noise"] == pytest.approx(mask[label == 0].mean())
        assert (row["num_signal"], row["num_noise"]) == ((label == 1).sum(), (label == 0).sum())
        assert (row["run"], row["rule"]) == ("a run", "excess k = 0.5")


def test_without_its_scores_the_rule_has_no_rows(make_analysis):
    assert kept_rows(make_analysis(LABEL, EXCESS, references=False)[0]) == []
