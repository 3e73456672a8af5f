"""Trigrams counted by a dictionary, hashed in Python's integers."""

from collections import Counter
from math import sqrt

import numpy as np
import pytest

from slm.prepare.grams import BUCKETS, features, linear_score

TEXTS = ["a b a b a b", "x", "", "Zürich \U0001f600\U0001f600", "the cat sat on the mat. " * 50]


def bucket(trigram: bytes) -> int:
    return int.from_bytes(trigram, "big") * 0x9E3779B1 % 2**32 // 2**16


def by_hand(text: str) -> dict[int, float]:
    data = text.encode() + b"\0" * max(0, 3 - len(text.encode()))
    found = Counter(bucket(data[i : i + 3]) for i in range(len(data) - 2))
    return {one: sqrt(count / (len(data) - 2)) for one, count in found.items()}


@pytest.mark.parametrize("text", TEXTS)
def test_features_are_roots_of_shares(text):
    found = features(text.encode())
    pairs = zip(found.buckets.tolist(), found.values, strict=True)
    assert dict(pairs) == pytest.approx(by_hand(text))
    assert sum(found.values**2) == pytest.approx(1)


@pytest.mark.parametrize("text", TEXTS)
def test_a_score_is_their_weighted_sum(text):
    weights = np.random.default_rng(0).normal(size=BUCKETS + 1)
    expected = sum(weights[one] * value for one, value in by_hand(text).items()) + weights[-1]
    assert linear_score(text.encode(), weights) == pytest.approx(expected)
