"""A sample against the documents that it was drawn from."""

import numpy as np
import pytest

from slm.errors import UserError
from slm.pilot.sample import RUN, Copies, draw, shares, write_sample
from slm.store.documents import Documents
from slm.store.windows import Windows

LENGTH = 8


def numbered(make_corpus, folder, sizes, sources=("a", "b"), **more):
    """Each document's tokens are its number, but the last, EOS."""
    ids = np.repeat(10 + np.arange(len(sizes)), sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    ids[starts + np.array(sizes) - 1] = 0
    rest = (1 - len(ids)) % LENGTH  # so that whole windows are left
    ids = np.concatenate([ids, np.full(rest, 9 + len(sizes))])
    more = {name: [np.resize(values, len(ids)).tolist()] for name, values in more.items()}
    return make_corpus(folder, [ids], LENGTH, starts=[starts.tolist()], sources=sources, **more)


@pytest.fixture
def documents(tmp_path, make_corpus):
    """Source a has twice the tokens of b."""
    return Documents(numbered(make_corpus, tmp_path / "corpus", [12, 6] * 10))


def test_every_source_has_its_share_and_the_draw_its_number_of_tokens(documents):
    for tokens in (31, 60, 90):
        found = draw(documents, tokens, [0, 1], ())
        assert found.num_tokens == tokens == sum(found.by_source().values())
        assert found.by_source()["a"] == pytest.approx(120 / documents.bounds[-1] * tokens, abs=1)
        assert (np.diff(found.chosen) > 0).all()
        cut = found.lengths < np.diff(documents.bounds)[found.chosen]
        assert cut.sum() <= 2  # the last one of each source


def test_a_draw_is_a_function_of_its_key_and_leaves_out_what_it_must(documents):
    one, same, other = (draw(documents, 60, [0, key], ()) for key in (1, 1, 2))
    assert one.chosen.tolist() == same.chosen.tolist() != other.chosen.tolist()
    rest = draw(documents, 60, [0, 1], one.chosen.tolist())
    assert not {*rest.chosen} & {*one.chosen}
    everything = draw(documents, 10**6, [0, 1], ())
    assert everything.num_tokens == documents.bounds[-1]


def test_shares_add_up():
    assert shares(np.array([200, 100]), 31).tolist() == [21, 10]
    assert shares(np.array([3, 0, 3]), 100).tolist() == [3, 0, 3]
    assert shares(np.array([1, 1, 1]), 2).sum() == 2


def test_a_sample_has_the_tokens_and_columns_of_its_documents(tmp_path, make_corpus):
    weights, signal = np.arange(1, 8) / 4, [1, 0, -1]
    corpus = numbered(
        make_corpus, tmp_path / "corpus", [12, 6] * 10, weights=weights, signal=signal
    )
    documents = Documents(corpus)
    found = draw(documents, 65, [0, 1], ())
    sample = write_sample([found], tmp_path / "sample")
    for name in ("tokens", "bytes", "weights", "signal"):
        pairs = zip(found.chosen, found.lengths, strict=True)
        wanted = np.concatenate([documents.column(name, d)[:n] for d, n in pairs])
        assert sample.column(name, 0).tolist() == wanted.tolist()
    assert sample.num_windows == 8
    begun = Documents(sample)
    assert begun.rows[:, 1:].tolist() == documents.rows[found.chosen, 1:].tolist()
    assert Windows(sample).batch([0])["input_ids"].shape == (1, LENGTH)
    again = write_sample([found], tmp_path / "sample")
    assert again.fingerprint == sample.fingerprint


def test_what_a_kill_left_is_made_anew(tmp_path, documents):
    found = draw(documents, 65, [0, 1], ())
    whole = write_sample([found], tmp_path / "whole")
    write_sample([found], tmp_path / "cut")
    (tmp_path / "cut" / "manifest.json").unlink()
    (tmp_path / "cut" / "tokens-00000.npy").write_bytes(b"half")
    assert write_sample([found], tmp_path / "cut").fingerprint == whole.fingerprint


def test_a_mixture_has_both_corpora_and_fills_in_what_one_lacks(tmp_path, documents, make_corpus):
    more = numbered(make_corpus, tmp_path / "more", [8] * 6, ("b",), masks=[True, False])
    parts = [draw(documents, 40, [0, 1], ()), draw(Documents(more), 25, [0, 1], ())]
    sample = write_sample(parts, tmp_path / "mixed")
    assert sample.manifest["sources"] == ["a", "b", "b (2)"]
    assert sample.column("masks", 0)[:40].all() and not sample.column("masks", 0)[40:].all()
    assert {*Documents(sample).rows[:, 1]} == {0, 1, 2}


def shuffled(make_corpus, folder, documents):
    starts = np.cumsum([0, *(len(one) for one in documents[:-1])])
    ids = np.concatenate([*documents, np.zeros((1 - sum(map(len, documents))) % LENGTH, int)])
    return make_corpus(folder, [ids], LENGTH, starts=[starts.tolist()], sources=("a",))


def test_copies_of_held_out_text_are_passed_over(tmp_path, make_corpus):
    """Whole, with a line before it, and half; less than half and what is short are none."""
    own = np.random.default_rng(0).integers(1, 290, (40, 100))
    theirs = np.random.default_rng(1).integers(1, 290, (2, 100))
    own[3] = theirs[0]
    own[5, 10:] = theirs[1, :90]
    own[7, :70] = theirs[1, :70]
    own[9, :60] = theirs[1, :60]  # 29 of its 69 runs
    documents = Documents(shuffled(make_corpus, tmp_path / "corpus", [*own, theirs[0, : RUN - 1]]))
    held = shuffled(make_corpus, tmp_path / "held", [*theirs])
    copies = Copies({"math": held})
    every = copies.draw(documents, 10**6, [0, 1], [39])
    assert sorted(set(range(41)) - {*every.chosen.tolist()}) == [3, 5, 7, 39]
    assert copies.left_out() == {"math": 3}
    few = copies.draw(documents, 900, [0, 1], ())
    plain = draw(documents, 900, [0, 1], ()).chosen.tolist()
    assert few.num_tokens == 900 and {*plain} - {3, 5, 7} <= {*few.chosen.tolist()}


def test_a_draw_does_not_depend_on_the_copies_that_others_met(tmp_path, make_corpus):
    """Of two sources, one of which holds them all."""
    own = np.random.default_rng(0).integers(1, 290, (60, 64))
    starts = (np.arange(60) * 64).tolist()
    ids = np.append(own.ravel(), np.zeros((1 - own.size) % LENGTH, int))
    corpus = make_corpus(tmp_path / "corpus", [ids], LENGTH, starts=[starts], sources=("a", "b"))
    documents = Documents(corpus)
    copied = own[np.flatnonzero(documents.rows[:60, 1] == 0)[:12]]
    held = shuffled(make_corpus, tmp_path / "held", [*copied])
    alone, other = Copies({"math": held}), Copies({"math": held})
    one = alone.draw(documents, 700, [0, 1], ())
    met = other.draw(documents, 10**6, [0, 2], ())  # all of them
    assert met.num_tokens == documents.bounds[-1] - 12 * 64
    same = other.draw(documents, 700, [0, 1], ())
    assert one.num_tokens == same.num_tokens == 700
    assert one.chosen.tolist() == same.chosen.tolist()
    assert one.lengths.tolist() == same.lengths.tolist()


def test_held_out_text_that_is_much_of_what_is_drawn_is_refused(tmp_path, make_corpus):
    own = np.random.default_rng(0).integers(1, 290, (10, 50))
    documents = Documents(shuffled(make_corpus, tmp_path / "corpus", [*own]))
    copies = Copies({"math": shuffled(make_corpus, tmp_path / "held", [*own[:2]])})
    copies.draw(documents, 10**6, [0, 1], ())
    with pytest.raises(UserError, match="held-out set math .*held. has 2 of the 1[01] documents"):
        copies.left_out()
