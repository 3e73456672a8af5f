"""What a rule keeps of a corpus, counted token by token; which documents are taken."""

import numpy as np
import pytest

from slm.errors import UserError
from slm.selection import Excess, Random
from slm.store.windows import Windows
from slm.train.kept import CANDIDATE, KEPT, NONE, Kept, Shares, choose, documents_of
from slm.train.order import Order

LENGTH = 4


@pytest.fixture
def scored(tmp_path, make_corpus, make_references):
    """Two shards of 3 and 2 windows; a document in both of them; a prompt; both models' scores."""
    shards = [np.arange(0, 13), np.arange(100, 109)]
    masks = [[int(token) % 6 != 1 for token in tokens] for tokens in shards]
    corpus = make_corpus(tmp_path / "c", shards, LENGTH, starts=[[0, 3, 8], [-5, 4]], masks=masks)
    generator = np.random.Generator(np.random.PCG64(0))
    stores = [
        make_references(
            tmp_path / name,
            corpus,
            [np.r_[np.nan, -generator.exponential(2.0, len(s) - 1)] for s in shards],
        )
        for name in ("references", "model")
    ]
    return corpus, *(Windows(corpus, [store]) for store in stores)


def excess_by_hand(references: Windows, losses: Windows) -> list[float]:
    """Of the 22 tokens; NaN of what is no target."""
    found = []
    for shard in range(2):
        pair = [w.corpus.column("tokens", shard) for w in (references,)]
        theirs, ours = (w.references[0].column("logprobs", shard) for w in (references, losses))
        live = references.corpus.column("masks", shard)
        assert len(pair[0]) == len(theirs)
        found += [t - o if m else np.nan for t, o, m in zip(theirs, ours, live, strict=True)]
    return found


def test_each_window_is_asked_once(tmp_path, scored):
    """The higher half of every window's excess; a shard's first token and prompts are nothing."""
    corpus, references, losses = scored
    way = {"together": 2, "seed": 3, "tokens_seen": 0}
    kept = Kept.of(Excess(0.5, "sequence"), references, losses, tmp_path, **way)
    excess = excess_by_hand(references, losses)
    expected = [NONE] * len(excess)
    for first in (1, 5, 9, 14, 18):
        places = [i for i in range(first, first + LENGTH) if excess[i] == excess[i]]
        ranked = sorted(places, key=lambda i: -excess[i])
        for rank, place in enumerate(ranked):
            expected[place] = KEPT if rank < int(len(places) / 2 + 0.5) else CANDIDATE
    assert kept.state.tolist() == expected and len(set(expected)) == 3
    assert kept.excess is not None
    np.testing.assert_allclose(kept.excess, excess, rtol=1e-6)


def test_windows_that_are_ranked_together_are_those_of_the_order(tmp_path, scored):
    corpus, references, losses = scored
    way = {"together": 2, "seed": 3, "tokens_seen": 0}
    kept = Kept.of(Excess(0.4, "global"), references, losses, tmp_path, **way)
    windows = np.array([1, 5, 9, 14, 18])[Order(5, 3).samples(0, 5)[0]]
    for group in (windows[:2], windows[2:4], windows[4:]):
        state = kept.state[np.concatenate([np.arange(w, w + LENGTH) for w in group])]
        assert (state == KEPT).sum() == int((state != NONE).sum() * 0.4 + 0.5)


def test_documents_are_counted_over_shards(tmp_path, scored):
    corpus, references, losses = scored
    way = {"together": 5, "seed": 0, "tokens_seen": 0}
    kept = Kept.of(Excess(0.5), references, losses, tmp_path, **way)
    found = documents_of(corpus, kept)
    assert found.begins.tolist() == [0, 3, 8, 17] and found.ends.tolist() == [3, 8, 17, 22]
    assert kept.excess is not None
    for number, (begin, end) in enumerate(zip(found.begins, found.ends, strict=True)):
        state, excess = kept.state[begin:end], kept.excess[begin:end]
        assert found.candidates[number] == (state != NONE).sum()
        assert found.share[number] == (state == KEPT).sum() / (state != NONE).sum()
        assert found.excess[number] == pytest.approx(np.nanmean(excess), rel=1e-6)


def test_a_rule_that_needs_no_losses_is_asked_without(tmp_path, scored):
    corpus, references, _ = scored
    way = {"together": 5, "seed": 0, "tokens_seen": 0}
    kept = Kept.of(Random(0.5, seed=1), Windows(corpus), None, tmp_path, **way)
    assert kept.excess is None and (kept.state == KEPT).sum() == int(
        (kept.state > 0).sum() / 2 + 0.5
    )
    assert np.isnan(documents_of(corpus, kept).excess).all()


NAN = np.nan
FOUND = Shares(
    begins=np.array([0, 10, 30, 35, 40]),
    ends=np.array([10, 30, 35, 40, 60]),
    source=np.zeros(5, int),
    record=np.arange(5),
    candidates=np.array([10, 20, 5, 0, 20]),
    kept=np.array([5, 15, 5, 0, 15]),
    excess=np.array([0.5, -1.0, NAN, NAN, 2.0]),
)


@pytest.mark.parametrize(
    ("by", "least", "max_tokens", "expected"),
    [
        ("share", None, None, [0, 1, 2, 3, 4]),  # one without candidates, too
        ("share", 0.75, None, [1, 2, 4]),
        ("share", None, 25, [1, 2]),  # 5 of share 1, then 20 of 0.75, the first of two
        ("share", None, 54, [1, 2, 4]),
        ("share", 0.8, 54, [2]),
        ("excess", None, 30, [0, 4]),
        ("excess", -1, None, [0, 1, 4]),
    ],
)
def test_documents_by_threshold_and_budget(by, least, max_tokens, expected):
    assert np.flatnonzero(choose(FOUND, by, least, max_tokens)).tolist() == expected


def test_what_takes_no_document_is_said():
    with pytest.raises(UserError, match="least is 1.5, the highest share of a document is 1$"):
        choose(FOUND, "share", 1.5, None)
    with pytest.raises(UserError, match="max_tokens is 4, .* of the highest share has 5"):
        choose(FOUND, "share", None, 4)
