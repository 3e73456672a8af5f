"""Features + labels -> a regression of the label, and what it says of documents it has not seen.

Linear on hashed trigrams (ridge regression, its penalty by generalised cross-validation), a random
forest on hidden states; both are scikit-learn's. A document is good where its label is at least the
threshold. Cross-validation, folds with equal shares of good documents:

    agreement   share of documents whose score, rounded, is the label
    kappa       Cohen's, with quadratic weights: agreement beyond chance, by how far labels are off
    precision, recall, f1   of "the score is at least the threshold" as "the document is good"
    auc         a good document has the higher score of the two, over all pairs of good and not
    kept        share of the documents whose score is at least the threshold
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.prepare.grams import BUCKETS, features
from slm.quality.labels import HIGHEST, LOWEST
from slm.store.files import Json

TREES, LEAF_SHARE = 300, 1 / 3  # of the forest: trees, features looked at in a node
FIGURES = ("agreement", "kappa", "precision", "recall", "f1", "auc", "kept")
PENALTIES = np.logspace(-5, 3, 17)


def check_installed() -> None:
    if find_spec("sklearn") is None:
        raise UserError("scikit-learn is not installed: pip install 'slm-trainer[quality]'")


def hashed_matrix(texts: Sequence[str]) -> Any:  # (n, BUCKETS), sparse
    from scipy.sparse import csr_matrix

    rows = [features(text.encode()) for text in texts]
    ends = np.cumsum([0, *(len(row.buckets) for row in rows)])
    values = np.concatenate([row.values for row in rows])
    buckets = np.concatenate([row.buckets for row in rows]).astype(np.int32)
    return csr_matrix((values, buckets, ends), shape=(len(rows), BUCKETS))


def linear() -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(PENALTIES)


def forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(TREES, max_features=LEAF_SHARE, random_state=seed)


def check_classes(labels: np.ndarray, threshold: float, folds: int, where: str) -> None:
    good = int((labels >= threshold).sum())
    bad = len(labels) - good
    if not good or not bad:
        side = "below" if bad else "at or above"
        raise UserError(
            f"{where}: all {len(labels):,} labels ({labels.min()} to {labels.max()}) are {side} "
            f"threshold={threshold:g}, and a classifier learns from both kinds of documents"
        )
    if min(good, bad) < folds:
        raise UserError(
            f"{where}: {good:,} labels are at least threshold={threshold:g} and {bad:,} below it, "
            f"folds={folds} needs as many of both"
        )


def cross_validated(
    model: Any, matrix: Any, labels: np.ndarray, threshold: float, folds: int, seed: int
) -> Json:
    from sklearn import metrics
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    good = labels >= threshold
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, good)
    scores = cross_val_predict(model, matrix, labels, cv=[*splits])
    rounded = np.clip(np.rint(scores), LOWEST, HIGHEST).astype(int)
    kept = scores >= threshold
    figures = (
        metrics.accuracy_score(labels, rounded),
        metrics.cohen_kappa_score(labels, rounded, weights="quadratic"),
        metrics.precision_score(good, kept, zero_division=0),
        metrics.recall_score(good, kept),
        metrics.f1_score(good, kept),
        metrics.roc_auc_score(good, scores),
        kept.mean(),
    )
    return {"folds": folds} | dict(zip(FIGURES, map(float, figures), strict=True))
