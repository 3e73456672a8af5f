"""Shards from a source whose scores are known; tests/test_score.py has them from a model."""

from pathlib import Path

import numpy as np
import pytest

from slm.errors import UserError
from slm.score.command import make_plan
from slm.score.scorer import Arrays, Scorer, finish, is_finished, store_bytes, stored
from slm.store.columns import ENTROPY, LOGPROBS
from slm.store.files import write_json
from slm.store.shards import Corpus, References

T = 16


class Counted:
    """The log-prob of target t of window w is -(w * T + t), the entropy the negative."""

    columns = (LOGPROBS, ENTROPY)

    def scores(self, numbers: np.ndarray) -> Arrays:
        values = (numbers[:, None] * T + np.arange(T)).astype(np.float32)
        return {"entropy": values, "logprobs": -values}

    def cost(self, seconds: float, tokens: int) -> None: ...


@pytest.fixture
def scorer(tmp_path: Path, text_corpus: Corpus) -> Scorer:
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "plan.json", make_plan(text_corpus, None, {}))
    return Scorer(Counted(), text_corpus, out, 3, "float32")


def test_every_column_is_at_the_index_of_its_token(scorer):
    done: list[int] = []
    assert scorer.run(done.append) == 640 == sum(done)
    finish(scorer)
    references = References.open(scorer.out, "full")
    for index in range(2):
        expected = np.r_[np.nan, np.arange(320) + 320 * index]
        np.testing.assert_array_equal(references.column("entropy", index), expected)
        np.testing.assert_array_equal(references.column("logprobs", index), -expected)
    assert not list(scorer.out.glob("cost-*"))  # this source knows of none
    assert is_finished(scorer) and store_bytes(scorer, 640) == 640 * 4 * 2


@pytest.mark.parametrize("column", ["logprobs", "entropy"])
def test_a_shard_is_done_with_all_of_its_columns(scorer, column):
    scorer.run(lambda count: None)
    assert scorer.missing() == []
    (scorer.out / f"{column}-00001.npy").unlink()
    assert [shard.index for shard in scorer.missing()] == [1] and not is_finished(scorer)


def test_a_score_that_float16_cannot_hold_is_refused():
    assert stored("logprobs", np.array([np.nan, -6e4], np.float32), "float16")[1] == np.float16(
        -6e4
    )
    with pytest.raises(UserError, match="float16 cannot hold log-prob -70000.0"):
        stored("logprobs", np.array([np.nan, -7e4], np.float32), "float16")
