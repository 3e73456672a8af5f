"""A sample against the documents that it was drawn from."""

import numpy as np
import pytest

from slm.errors import UserError
from slm.pilot.sample import check_apart, draw, shares, write_sample
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


def test_a_held_out_document_that_is_trained_on_is_refused(tmp_path, documents, make_corpus):
    held = numbered(make_corpus, tmp_path / "held", [12, 7])
    drawn = draw(documents, 10**6, [0, 1], ())  # its first document is held out, too
    with pytest.raises(UserError, match="held-out set math .*document 0 .* a document of 12 tok"):
        check_apart(held, [drawn], "math", 12)
    check_apart(held, [drawn], "math", 13)
    check_apart(held, [draw(documents, 10**6, [0, 1], [0])], "math", 1)
