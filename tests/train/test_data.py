"""The settings of what a run trains on; the windows themselves are in test_data.py."""

import numpy as np
import pytest

from slm.errors import UserError
from slm.train.data import TokenData


def test_batch_size_must_be_a_multiple(text_corpus):
    data = TokenData(str(text_corpus.folder), None, None, {}, 1, 6, 4, 0, "size", 0)
    with pytest.raises(UserError, match=r"data.batch_size \(6\).*\(4 \* 1\)"):
        data.accumulate(1)


@pytest.mark.parametrize(
    ("count", "how", "message"),
    [
        (2, None, "data.references names 2 folders: data.combine must be one of"),
        (1, "mean", r"data.combine is 'mean' for 1 reference\(s\)"),
        (0, "mean", r"data.combine is 'mean' for 0 reference\(s\)"),
        (2, "median", "data.combine is 'median' for 2"),
    ],
)
def test_combine_is_for_several(tmp_path, text_corpus, make_references, count, how, message):
    scores = [np.r_[np.nan, -np.ones(shard.num_tokens - 1)] for shard in text_corpus.shards]
    folders = [
        str(make_references(tmp_path / f"r{i}", text_corpus, scores).folder) for i in range(count)
    ]
    with pytest.raises(UserError, match=message):
        TokenData(str(text_corpus.folder), folders, how, None, 1, 4, 4, 0, "size", 0)
