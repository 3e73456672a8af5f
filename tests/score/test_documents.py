"""Scores of documents against a plain forward over each of them; stores that grow; kills."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from document_helpers import (
    TEXTS,
    byte_level,
    corpus_of,
    documents_of,
    save_reference,
    score_into,
    words,
)
from slm.errors import UserError
from slm.model.build import load_model
from slm.score import documents as module
from slm.score.bind import bind_scores
from slm.score.command import score
from slm.score.pieces import pieces_of
from slm.score.readings import OtherTokens
from slm.store.document_scores import open_parts
from slm.store.documents import Documents
from slm.store.shards import Corpus
from slm.store.tokenizer import PAD
from slm.verify import verify


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("corpus"), TEXTS, tokenizer)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tokenizer) -> Path:
    return save_reference(tmp_path_factory.mktemp("reference") / "model", tokenizer)


def whole_texts(corpus: Corpus, tokenizer) -> list[list[int]]:
    """Tokens of each document, from the corpus's stream cut behind each EOS."""
    tokens = np.concatenate([corpus.column("tokens", i) for i in range(len(corpus.shards))])
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
    return [one.tolist() for one in np.split(tokens, ends) if len(one)]


def defined(model, first: int, tokens: list[int], context: int, stride: int) -> list[float]:
    """Log p of each token by itself: a forward over its window alone, in float64."""
    stream, found = [first, *tokens], []
    for place, token in enumerate(tokens):
        begin = next(b for b in range(0, len(stream), stride) if place < b + context)
        logits = model(torch.tensor([stream[begin : place + 1]])).logits[0, -1]
        found.append(logits.log_softmax(-1)[token].item())
    return found


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (8, 4), (8, 3), (5, 5)])
def test_each_document_alone_equals_a_plain_forward(
    tmp_path, corpus, reference, tokenizer, context, stride
):
    part = score_into(tmp_path / "s", corpus, reference, context=context, stride=stride)
    model = load_model(reference).double()
    found, expected = documents_of(part), whole_texts(corpus, tokenizer)
    assert len(found) == len(expected) > 10 and len(part.shards) > 2
    assert max(map(len, expected)) > 2 * 8  # several windows
    first = tokenizer.eos_token_id  # it has no BOS
    for scores, tokens in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            scores, defined(model, first, tokens, context, stride), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize(
    ("count", "context", "stride"), [(1, 4, 2), (4, 4, 2), (11, 4, 3), (9, 4, 4)]
)
def test_every_token_once_from_the_window_with_most_context(count, context, stride):
    pieces = list(pieces_of(0, count, context, stride))
    taken = [b + s + i for _, b, n, s in pieces for i in range(n - s)]
    assert taken == list(range(count))
    for _, begin, length, skip in pieces:
        for place in range(begin + skip, begin + length):
            windows = [b for b in range(0, count, stride) if b <= place < b + context]
            assert begin == min(windows)


def test_a_store_grows_by_what_it_lacks(tmp_path, corpus, reference, tokenizer):
    first = score_into(tmp_path / "s", corpus, reference)
    assert (first.manifest["seq_len"], first.manifest["scoring"]["stride"]) == (8, 4)  # its windows
    more = corpus_of(
        tmp_path / "more", [*TEXTS[6:9], "new here", *TEXTS[:2], "new here"], tokenizer
    )
    second = score_into(tmp_path / "s", more, reference)
    assert second.manifest["after"] == [first.fingerprint]
    found = documents_of(second)
    alone = corpus_of(tmp_path / "alone", ["new here", "filled " * 5], tokenizer)
    expected = documents_of(score_into(tmp_path / "t", alone, reference))[0]
    assert len(found[0]) == len(expected)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert len(found) <= 2  # and the one that the end has cut
    twice = corpus_of(tmp_path / "twice", ["again and again"] * 3 + ["filled " * 9], tokenizer)
    assert len(documents_of(score_into(tmp_path / "u", twice, reference))) == 2
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert score(more, tmp_path / "s", reference_model=reference, layout="documents", device="cpu")
    assert before == {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert all(whole for _, whole, _ in verify(tmp_path / "s"))


def test_killed_and_run_again_the_bytes_are_the_same(tmp_path, corpus, reference, monkeypatch):
    whole = score_into(tmp_path / "whole", corpus, reference)
    own, calls = module.DocumentScorer.write_part, []

    def killed(self, shard, arrays, cost, publish):
        calls.append(shard.index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        own(self, shard, arrays, cost, publish)

    monkeypatch.setattr(module.DocumentScorer, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        score_into(tmp_path / "s", corpus, reference)
    with pytest.raises(UserError, match="holds no scores of documents"):
        open_parts([str(tmp_path / "s")])
    again = score_into(tmp_path / "s", corpus, reference)
    assert sorted(calls) == sorted([*range(len(corpus.shards)), 2])
    for path in sorted(whole.folder.iterdir()):
        if not path.name.startswith("cost"):
            assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name
    assert {p.name for p in whole.folder.iterdir()} == {p.name for p in again.folder.iterdir()}


def test_what_it_refuses(tmp_path, corpus, reference, tokenizer):
    for more, sentence in [
        ({"entropy": True}, "columns is entropy, but layout=documents"),
        ({"max_tokens": 9}, "max_tokens is 9, but layout=documents"),
        ({"context": 4, "stride": 5}, "stride is 5, context is 4"),
        ({"context": 2049}, "context is 2049, model max_position_embeddings is 2048"),
    ]:
        with pytest.raises(UserError, match=sentence):
            score_into(tmp_path / "x", corpus, reference, **more)
    with pytest.raises(UserError, match="holds something else"):
        score_into(corpus.folder, corpus, reference)
    assert not (tmp_path / "x").exists()
    score_into(tmp_path / "s", corpus, reference, context=8)
    more = corpus_of(tmp_path / "more", ["other text", "filled " * 9], tokenizer)
    other = save_reference(tmp_path / "other", tokenizer, seed=1)
    with pytest.raises(UserError, match="two references: model_sha256 is '.*' and '.*' .a hash of"):
        score_into(tmp_path / "s", more, other)
    with pytest.raises(UserError, match="two references: seq_len is 8 and 9"):
        score_into(tmp_path / "s", more, reference, context=9)
    assert score_into(tmp_path / "s", more, reference).manifest["seq_len"] == 8


def test_a_part_whose_predecessor_is_gone_does_not_go_on(tmp_path, corpus, reference, tokenizer):
    first = score_into(tmp_path / "s", corpus, reference)
    more = corpus_of(tmp_path / "more", ["other text", "filled " * 9], tokenizer)
    second = score_into(tmp_path / "s", more, reference)
    (second.folder / "manifest.json").unlink()
    shutil.rmtree(first.folder)
    with pytest.raises(UserError, match="after names a part with fingerprint .*, which is not in"):
        score_into(tmp_path / "s", more, reference)


def test_a_model_of_another_tokenizer_reads_the_text(tmp_path, corpus):
    foreign = byte_level()
    whole = {"context": 99, "stride": 99}
    part = score_into(tmp_path / "s", corpus, save_reference(tmp_path / "m", foreign), **whole)
    model, first = load_model(tmp_path / "m").double(), foreign.eos_token_id
    texts, found = [TEXTS[0], TEXTS[3]], documents_of(part)
    for text, scores in zip(texts, [found[0], found[3]], strict=True):
        ids = foreign.encode(text, split_special_tokens=True, add_special_tokens=False)
        tokens = [*ids, foreign.eos_token_id]
        np.testing.assert_allclose(scores, defined(model, first, tokens, 99, 99), rtol=0, atol=2e-4)


def test_without_a_text_its_tokens_find_it(tmp_path):
    """A vocabulary without bytes and spaces: nothing but the same tokens is the same document."""
    lossy = words(joined=True)
    texts = ["ab cd", "cd", "ab ab cd", "cd ab " * 9 + "ab"]
    corpus = corpus_of(tmp_path / "a", texts, lossy, seq_len=2)
    part = score_into(tmp_path / "s", corpus, save_reference(tmp_path / "m", lossy), context=99)
    found = documents_of(part)
    assert [len(scores) for scores in found[:3]] == [3, 2, 4]
    other = corpus_of(tmp_path / "b", [texts[2], texts[0], texts[2], texts[0]], lossy, seq_len=3)
    references = bind_scores(other, part.folder, tmp_path / "r", missing="skip")
    stream = np.concatenate([found[2], found[0], found[2], found[0]])[1:]
    bound = references.column("logprobs", 0)[1:]
    np.testing.assert_array_equal(bound[:9], stream[:9])
    assert np.isnan(bound[9:]).all()  # windows of the last one, which the end has cut
    assert [one for one in verify(tmp_path / "s") if not one[1]] == []
    assert [one for one in verify(tmp_path / "r") if not one[1]] == []


def retokenized(folder: Path, tokenizer, **special) -> Path:
    """The model's folder with the same vocabulary under other names of special tokens."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("special", [{"eos_token": PAD}, {}])
def test_a_reference_with_another_eos_or_none_reads_the_corpus_as_its_own(
    tmp_path, corpus, reference, tokenizer, special
):
    shutil.copytree(reference, tmp_path / "model")
    chat = retokenized(tmp_path / "model", tokenizer, **special)
    made = score_into(tmp_path / "s", corpus, chat)
    plain = score_into(tmp_path / "p", corpus, reference)
    assert made.manifest["tokenizer_sha256"] == corpus.manifest["tokenizer_sha256"]
    for found, expected in zip(documents_of(made), documents_of(plain), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_another_tokenizer_keeps_its_own_eos(tmp_path, corpus):
    """Its token of the id that ends our documents (0) is none of its special ones."""
    ours, other = corpus.manifest["eos_id"], byte_level()
    model = save_reference(tmp_path / "model", other)
    retokenized(model, other, eos_token=PAD)
    found, is_own = module.reference_tokenizer(str(model), corpus)
    assert not is_own and found.eos_token_id == other.convert_tokens_to_ids(PAD) != ours
    reader = OtherTokens(Documents(corpus), found)
    assert reader.read(0).tokens[-1] == found.eos_token_id
    retokenized(model, other)
    with pytest.raises(UserError, match=r"model: eos_token of its tokenizer is null, which is an"):
        score(corpus, tmp_path / "s", reference_model=model, layout="documents", device="cpu")


def test_what_the_end_has_cut_is_said(tmp_path, corpus, reference, tokenizer, make_corpus, caplog):
    caplog.set_level("INFO")
    eos = tokenizer.eos_token_id
    tokens = Documents(corpus).tokens(len(Documents(corpus)) - 1)
    assert tokens[-1] != eos
    score_into(tmp_path / "s", corpus, reference)
    assert f"the end of {corpus.folder} has cut it" in caplog.text
    caplog.clear()
    whole = make_corpus(tmp_path / "w", [[*tokenizer.encode("a" * 16), eos]], 8, starts=[[0]])
    assert len(Documents(whole).tokens(0)) == 17
    score_into(tmp_path / "t", whole, reference)
    assert "1 of 1 documents" in caplog.text and "has cut it" not in caplog.text
