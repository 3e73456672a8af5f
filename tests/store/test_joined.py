"""Corpora as one: every window is what its own corpus gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from slm.errors import UserError
from slm.store.joined import join_corpora, join_references
from slm.store.windows import IGNORE_INDEX, Windows

SEQ_LEN = 4


def tokens(start: int, windows: int) -> np.ndarray:
    return np.arange(start, start + windows * SEQ_LEN + 1)


@pytest.fixture
def two(tmp_path, make_corpus):
    """3 + 1 windows, and 2 with masks and weights, of two sources in one."""
    one = make_corpus(tmp_path / "one", [tokens(0, 3), tokens(50, 1)], SEQ_LEN)
    live = [i % 3 != 0 for i in range(2 * SEQ_LEN + 1)]
    weights = [0.5 * i for i in range(2 * SEQ_LEN + 1)]
    other = make_corpus(
        tmp_path / "other",
        [tokens(100, 2)],
        SEQ_LEN,
        starts=[[0, 3]],
        masks=[live],
        weights=[weights],
        sources=("a", "b"),
    )
    return {"web": one, "math": other}


def key(name: str) -> str:
    return f"mixture.{name}"


def test_windows_follow_one_another(two):
    corpus = join_corpora(two, key)
    assert corpus.num_windows == 6 and corpus.manifest["sources"] == ["web", "math"]
    batch = Windows(corpus).batch(range(6))
    own = [Windows(part).batch(range(part.num_windows)) for part in two.values()]
    for name in ("input_ids", "targets"):
        assert torch.equal(batch[name], torch.cat([part[name] for part in own]))
    assert (batch["targets"][4:] == IGNORE_INDEX).any()  # its masks
    weight = torch.cat([torch.ones(4, SEQ_LEN), own[1]["token_weight"]])
    assert torch.equal(batch["token_weight"], weight)
    assert Windows(corpus).sources(np.arange(6)).tolist() == [[0] * 4] * 4 + [[1] * 4] * 2
    assert corpus.parts_of(np.arange(6)).tolist() == [0, 0, 0, 0, 1, 1]
    assert corpus.file("tokens", 2) == two["math"].folder / "tokens-00000.npy"


def test_references_belong_to_the_corpus_at_their_place(two, tmp_path, make_references):
    corpus = join_corpora(two, key)
    scores = {
        name: [-np.arange(1.0, shard.num_tokens + 1) - 100 * i for shard in part.shards]
        for i, (name, part) in enumerate(two.items())
    }
    with_entropy = scores["web"], [np.ones_like(one) for one in scores["web"]]
    one = make_references(tmp_path / "r1", two["web"], *with_entropy)
    other = make_references(tmp_path / "r2", two["math"], scores["math"])
    windows = Windows(corpus, [join_references([one, other])])
    assert [column.name for column in windows.columns] == ["logprobs"]  # what both have
    own = [
        Windows(part, [store]).batch(range(part.num_windows))["reference_logprob"]
        for part, store in zip(two.values(), (one, other), strict=True)
    ]
    assert torch.equal(windows.batch(range(6))["reference_logprob"], torch.cat(own))
    with pytest.raises(UserError, match=f"^{other.folder} scores another corpus"):
        Windows(corpus, [join_references([other, one])])


def test_its_fingerprint_is_that_of_its_parts(two, tmp_path):
    one, other = two["web"], two["math"]
    joined = join_corpora(two, key)
    assert joined.fingerprint == join_corpora({"x": one, "y": other}, key).fingerprint
    assert joined.fingerprint != join_corpora({"y": other, "x": one}, key).fingerprint
    assert joined.fingerprint not in (one.fingerprint, other.fingerprint)
    assert joined.folder == Path(f"{one.folder} + {other.folder}")


def test_other_windows_are_refused(two, tmp_path, make_corpus):
    longer = make_corpus(tmp_path / "longer", [np.arange(17)], 8)
    message = rf"^mixture.b \({longer.folder}\) has seq_len 8, mixture.a \(.*\) 4: a mixture"
    with pytest.raises(UserError, match=message):
        join_corpora({"a": two["web"], "b": longer}, key)
