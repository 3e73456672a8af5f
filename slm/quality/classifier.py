"""A classifier that was read from its folder: texts -> scores, on the scale of the labels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.grams import BUCKETS, linear_score
from slm.quality.forest import Forest
from slm.store.quality import CLASSIFIER, HASHED, Quality

Scores = Callable[[Sequence[str]], np.ndarray]  # (n,) texts -> (n,) float64


class How(NamedTuple):
    """Of a forward, where there is one."""

    batch_size: int
    dtype: str
    device: str


def scorer(quality: Quality, base_model: str | None, how: How) -> Scores:
    """base_model: where the model of the hidden states lies now; None: where it lay."""
    if quality.manifest["kind"] != CLASSIFIER:
        raise UserError(f"classifier {quality.folder} has scores of documents and is none")
    if quality.manifest["features"] == HASHED:
        weights = hashed_weights(quality)
        return lambda texts: np.array([linear_score(text.encode(), weights) for text in texts])
    return hidden_scorer(quality, base_model or quality.manifest["base_model"], how)


def hashed_weights(quality: Quality) -> np.ndarray:
    weights = quality.arrays["weights"] if "weights" in quality.arrays else np.empty(0)
    if weights.shape != (BUCKETS + 1,) or not np.isfinite(weights).all():
        raise UserError(f"{quality.folder}/weights.npy must be {BUCKETS + 1} finite numbers")
    return weights


def hidden_scorer(quality: Quality, base_model: str, how: How) -> Scores:
    from slm.quality.hidden import Hidden  # imports torch

    manifest: Any = quality.manifest
    if quality.arrays.keys() != {*Forest._fields}:
        raise UserError(f"{quality.folder} must have the arrays {', '.join(Forest._fields)}")
    forest = Forest(**quality.arrays)
    hidden = Hidden(base_model, manifest["context"], *how)
    if hidden.sha256 != manifest["model_sha256"]:
        raise UserError(
            f"base_model {base_model} has model_sha256 {hidden.sha256}, the classifier "
            f"{quality.folder} was trained on {manifest['model_sha256']}"
        )
    forest.check(str(quality.folder), hidden.width)
    return lambda texts: forest.scores(hidden(texts))
