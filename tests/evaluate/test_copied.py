"""Runs that texts share with a corpus, against a search of every place."""

import numpy as np
import pytest

from slm.evaluate import copied
from slm.evaluate.copied import Copied, Sequences
from slm.store.shards import Corpus


def shards(corpus: Corpus) -> list[list[int]]:
    return [corpus.column("tokens", i).tolist() for i in range(len(corpus.shards))]


def run_from(ids: list[int], shard: list[int], start: int, place: int) -> int:
    """Tokens from `start` that stand in the shard from `place`."""
    pairs = zip(ids[start:], shard[place:], strict=False)
    same = [a == b for a, b in pairs]
    return same.index(False) if False in same else len(same)


def by_hand(ids: list[int], corpora: list[list[int]], size: int) -> tuple[int, int]:
    """How many tokens lie in a run of `size`, and the length of the longest."""
    covered, longest = set[int](), 0
    for start in range(len(ids)):
        places = [(shard, place) for shard in corpora for place in range(len(shard))]
        length = max(run_from(ids, shard, start, place) for shard, place in places)
        if length >= size:
            covered |= set(range(start, start + length))
            longest = max(longest, length)
    return len(covered), longest


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_copied_runs_are_those_of_a_search_by_hand(tmp_path, make_corpus, monkeypatch, chunk):
    """Of few words, so that short runs are often shared; loops on both sides."""
    monkeypatch.setattr(copied, "CHUNK_TOKENS", chunk)
    random = np.random.default_rng(0)
    ids = [random.integers(5, 7, 16 * n + 1) for n in (4, 3)]
    ids[1][20:40] = 5
    corpus = make_corpus(tmp_path / "c", ids, seq_len=16)
    known, tokens = shards(corpus), [5, 6]
    texts = [known[0][3:40], known[-1][:9] + known[0][:9], [], known[0][5:9]]
    texts += [random.choice(tokens, 40).tolist() for _ in range(4)]
    sequences = Sequences([np.array(ids, np.int64) for ids in texts], 6)
    told: list[int] = []
    sequences.mark(corpus, told.append)
    found = sequences.copied()
    expected = [by_hand(ids, known, 6) for ids in texts]
    assert [(one.num_tokens, one.length) for one in found] == expected
    assert found[0] == Copied(37, 0, 37) and found[2:4] == [Copied(0, 0, 0)] * 2
    assert sum(told) == sum(map(len, known))
    for ids, one in zip(texts, found, strict=True):
        run = " ".join(map(str, ids[one.start : one.start + one.length]))
        assert any(run in " ".join(map(str, shard)) for shard in known)


def test_equal_hashes_of_other_tokens_are_no_copy(tmp_path, make_corpus, monkeypatch):
    monkeypatch.setattr(
        copied, "ngram_keys", lambda ids, size: np.zeros(len(ids) - size + 1, np.uint64)
    )
    corpus = make_corpus(tmp_path / "c", [np.arange(10, 43)], seq_len=16)
    shard = shards(corpus)[0]
    sequences = Sequences([np.array(shard[::-1][:20]), np.array(shard[2:12])], 8)
    sequences.mark(corpus)
    assert sequences.copied() == [Copied(0, 0, 0), Copied(10, 0, 10)]


def test_nothing_is_copied_of_no_text(tmp_path, make_corpus):
    corpus = make_corpus(tmp_path / "c", [np.arange(10, 43)], seq_len=16)
    sequences = Sequences([np.zeros(0, np.int64), np.array([5])], 8)
    sequences.mark(corpus)
    assert sequences.copied() == [Copied(0, 0, 0)] * 2
    assert Sequences([], 8).copied() == []
