"""Cross-validation by hand, on documents that a model has not seen."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator, RegressorMixin

from slm.errors import UserError
from slm.prepare.grams import features
from slm.quality.fit import check_classes, cross_validated, forest, hashed_matrix, linear


class Says(RegressorMixin, BaseEstimator):
    """Says of a document its first feature."""

    def fit(self, matrix: Any, labels: Any) -> "Says":
        return self

    def predict(self, matrix: Any) -> Any:
        return matrix[:, 0]


def test_figures_by_hand():
    labels = np.array([0, 1, 1, 2, 3, 3, 4, 5])
    scores = np.array([-0.6, 1.4, 3.2, 2.0, 2.8, 3.3, 5.9, 5.1])
    found = cross_validated(Says(), scores[:, None], labels, 3, 2, 0)
    assert found["folds"] == 2
    assert found["agreement"] == 6 / 8  # 0 1 3 2 3 3 5 5: rounded, within 0 and 5
    kept, good = scores >= 3, labels >= 3
    assert found["precision"] == pytest.approx(3 / 4) and found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(2 * 3 / (kept.sum() + good.sum()))
    pairs = [a > b for a, b in product(scores[good], scores[~good])]
    assert found["auc"] == pytest.approx(np.mean(pairs)) and found["kept"] == 4 / 8
    off = [(a - b) ** 2 for a, b in zip(labels, [0, 1, 3, 2, 3, 3, 5, 5], strict=True)]
    chance = [(a - b) ** 2 for a, b in product(labels, [0, 1, 3, 2, 3, 3, 5, 5])]
    assert found["kappa"] == pytest.approx(1 - np.mean(off) / np.mean(chance))


@pytest.mark.parametrize("model", [linear(), forest(0).set_params(n_estimators=20)])
def test_what_was_learned_by_heart_counts_nothing(model):
    """Labels without a reason: a model that has seen them knows them, one that has not guesses."""
    rng = np.random.default_rng(0)
    matrix, labels = rng.normal(size=(120, 40)), rng.integers(0, 6, 120)
    found = cross_validated(model, matrix, labels, 3, 4, 0)
    assert 0.3 < found["auc"] < 0.7 and found["agreement"] < 0.4


def test_the_matrix_has_the_features_of_each_text():
    texts = ["one text", "another", "x"]
    matrix = hashed_matrix(texts).toarray()
    for row, text in zip(matrix, texts, strict=True):
        found = features(text.encode())
        assert np.flatnonzero(row).tolist() == found.buckets.tolist()
        assert row[found.buckets].tolist() == found.values.tolist()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 1, 2], r"l.jsonl: all 3 labels \(0 to 2\) are below threshold=3, and a classifier"),
        ([5, 3], r"l.jsonl: all 2 labels \(3 to 5\) are at or above threshold=3"),
        ([0] * 9 + [4] * 3, "3 labels are at least threshold=3 and 9 below it, folds=5 needs"),
    ],
)
def test_labels_that_nothing_can_be_learned_from(labels, sentence):
    with pytest.raises(UserError, match=sentence):
        check_classes(np.array(labels), 3, 5, "l.jsonl")
    check_classes(np.array([0] * 5 + [3] * 5), 3, 5, "l.jsonl")
