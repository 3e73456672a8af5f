"""Documents by their quality: `keep={by: FOLDER, over: 3}` keeps those with a score of at least 3.

    by: quality        a classifier of `slm quality` on hashed features, applied in the workers
    by: scores         what `slm quality classifier= sources=` has written, by the text's hash
    by: "{int_score}"  a number that the records have, as FineWeb-Edu's do

The text is that which was read, without noise that is injected here. What is kept decides what is
in the corpus and nothing else: two corpora of the same documents have the same fingerprint.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.prepare.documents import Text
from slm.prepare.grams import BUCKETS, linear_score
from slm.prepare.sources import Source
from slm.store.files import Json
from slm.store.quality import CLASSIFIER, HIDDEN, KEY_BYTES, Quality, read_quality


@dataclass(frozen=True)
class Keep:
    """Which documents stay."""

    by: str  # as it was written
    over: float
    identity: str  # a field, or the fingerprint of a folder
    weights: np.ndarray | None = None  # (BUCKETS + 1,) of a classifier
    keys: np.ndarray | None = None  # (n,) S16, ascending, of scores
    scores: np.ndarray | None = None  # (n,)

    def plan(self) -> Json:
        return {"keep.by": self.identity, "keep.over": self.over}

    def keeps(self, text: Text) -> bool:
        return self.score(text) >= self.over

    def score(self, text: Text) -> float:
        if self.weights is not None:
            return linear_score(text.origin.encode(), self.weights)
        if self.keys is None or self.scores is None:
            assert text.score is not None, f"{text.where}: the source has the field {self.by}"
            return text.score
        key = text.digest.rstrip(b"\0")  # which NumPy leaves out of what it compares and gives
        at = min(int(np.searchsorted(self.keys, key)), len(self.keys) - 1)
        if self.keys[at] != key:
            raise UserError(
                f"{text.where}: its text is none of the {len(self.keys):,} that keep.by={self.by} "
                "has scores of (`slm quality classifier=... sources=...` scores all that is read)"
            )
        return float(self.scores[at])


def open_keep(given: Json, sources: list[Source]) -> tuple[Keep, list[Source]]:
    """What a `keep` says, and the sources with what they must read for it."""
    by, over = str(given["by"]), float(given["over"])
    if by.startswith("{") and by.endswith("}"):
        for source in sources:
            if source.format == "text":
                raise UserError(f"keep.by={by} is a field of records, {source.path} is text")
        return Keep(by, over, by), [replace(source, score=by[1:-1]) for source in sources]
    found = read_quality(Path(by).expanduser(), "keep.by")
    return Keep(by, over, found.fingerprint, **arrays_of(found, by)), sources


def arrays_of(found: Quality, by: str) -> dict[str, Any]:
    arrays, manifest = found.arrays, found.manifest
    if manifest["kind"] != CLASSIFIER:
        check(arrays, {"keys": (KEY_BYTES,), "scores": ()}, by)
        keys = np.ascontiguousarray(arrays["keys"]).view(f"S{KEY_BYTES}").ravel()
        return {"keys": keys, "scores": arrays["scores"]}
    if manifest["features"] == HIDDEN:
        raise UserError(
            f"keep.by={by} reads hidden states of {manifest['base_model']}: let it score the "
            f"documents first, `slm quality classifier={by} sources=... out=scores`, and then "
            "keep.by=scores"
        )
    check(arrays, {"weights": ()}, by)
    if len(arrays["weights"]) != BUCKETS + 1:
        raise UserError(
            f"{by}/weights.npy has {len(arrays['weights']):,} weights, {BUCKETS + 1:,} are needed"
        )
    return {"weights": arrays["weights"]}


def check(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], by: str) -> None:
    """shapes: without the first dimension, which is one of all arrays, and not 0"""
    found = {name: array.shape[1:] for name, array in arrays.items()}
    if found != shapes or len({len(array) for array in arrays.values()} - {0}) != 1:
        raise UserError(f"{by}: its arrays are {found}, expected {shapes}, each of as many rows")
