"""A corpus of two shards with two references, for the doors of the data."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path, make_corpus, make_references):
    """Two shards of 3 and 2 windows of 4; two references; prompts; by wish documents."""

    def make(packing: str, masked: bool):
        shards = [np.arange(0, 13), np.arange(100, 109)]
        masks = [[int(token) % 5 != 1 for token in tokens] for tokens in shards]
        starts = [[0, 3, 8, 12], [0, 2, 4]]  # at a window's end, inside, and at its first token
        corpus = make_corpus(
            tmp_path / "c", shards, 4, packing, starts, masks=masks if masked else None
        )
        scores = [np.r_[np.nan, -shard[1:] / 7] for shard in shards]
        stores = [
            make_references(tmp_path / f"r{i}", corpus, [factor * s for s in scores])
            for i, factor in enumerate((1.0, 3.0))
        ]
        return corpus, stores

    return make
