"""Scores of documents laid onto corpora of another order, packing, length and tokenizer."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from document_helpers import (
    END,
    TEXTS,
    byte_fallback,
    byte_level,
    corpus_of,
    documents_of,
    save_reference,
    score_into,
)
from slm.errors import UserError
from slm.score.bind import Binder, bind_scores, whole_windows
from slm.score.cost import references_cost
from slm.score.texts import Documents
from slm.store.document_scores import DocumentScores, open_parts
from slm.store.files import read_json
from slm.store.shards import Corpus, References
from slm.store.windows import IGNORE_INDEX, Windows
from slm.train.data import TokenData
from slm.train.order import Order
from slm.train.settings import check_scored
from slm.verify import verify


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tokenizer) -> Path:
    return save_reference(tmp_path_factory.mktemp("reference") / "model", tokenizer)


@pytest.fixture(scope="module")
def part(tmp_path_factory, tokenizer, reference) -> DocumentScores:
    folder = tmp_path_factory.mktemp("scored")
    return score_into(folder / "s", corpus_of(folder, [*TEXTS, END, END], tokenizer), reference)


@pytest.fixture(scope="module")
def by_text(part) -> dict[str, np.ndarray]:
    return dict(zip([*TEXTS, END], documents_of(part), strict=False))


def laid_out(corpus: Corpus, texts: list[str], by_text: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Shard by shard, as long as the corpus is: its end may have cut a document."""
    stream = np.concatenate([by_text[text] for text in texts])
    lengths = [shard.num_tokens for shard in corpus.shards]
    found = np.split(stream[: sum(lengths)].copy(), np.cumsum(lengths)[:-1])
    for values in found:
        values[0] = np.nan
    return found


def same(references: References, expected: list[np.ndarray]) -> None:
    for index, values in enumerate(expected):
        np.testing.assert_array_equal(references.column("logprobs", index), values)


@pytest.mark.parametrize("length", [8, 16, 5])
def test_another_order_mixture_and_window_length_are_exact_copies(
    tmp_path, tokenizer, part, by_text, length
):
    texts = [*TEXTS[::-1], *TEXTS[2:9], TEXTS[4], END]
    corpus = corpus_of(tmp_path, texts, tokenizer, seq_len=length, shard_tokens=70)
    assert len(corpus.shards) > 2
    references = bind_scores(corpus, part.folder.parent, tmp_path / "r")
    same(references, laid_out(corpus, texts, by_text))
    batch = Windows(corpus, [references]).batch(np.arange(corpus.num_windows))
    assert (batch["targets"] != IGNORE_INDEX).all() and not references.is_partial
    assert all(whole for _, whole, _ in verify(tmp_path / "r"))
    cost = references_cost(references.folder)
    assert cost is not None and cost["tokens"] == corpus.num_targets and cost["seconds"] > 0


def test_with_documents_apart_their_first_tokens_have_none(tmp_path, tokenizer, part, by_text):
    texts = [*TEXTS[5:], END]
    corpus = corpus_of(tmp_path, texts, tokenizer, packing="documents")
    references = bind_scores(corpus, part.folder, tmp_path / "r")  # a part, not the store
    expected = laid_out(corpus, texts, by_text)
    for index, values in enumerate(expected):
        starts = corpus.column("documents", index)[:, 0]
        values[starts[starts >= 0]] = np.nan
    same(references, expected)
    Windows(corpus, [references]).batch(np.arange(corpus.num_windows))
    assert all(whole for _, whole, _ in verify(tmp_path / "r"))


def test_a_missing_document_is_refused_or_its_windows_are_left_out(
    tmp_path, tokenizer, part, by_text
):
    texts = [*TEXTS[:5], "nobody has scored this", *TEXTS[5:], END]
    corpus = corpus_of(tmp_path, texts, tokenizer)
    with pytest.raises(UserError, match=r"^1 of 16 documents have no scores in .*record 5 of t"):
        bind_scores(corpus, part.folder.parent, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    references = bind_scores(corpus, part.folder.parent, tmp_path / "r", missing="skip")
    absent = np.full(len(tokenizer.encode(texts[5])) + 1, np.nan)
    expected = laid_out(corpus, texts, by_text | {texts[5]: absent})
    scored: list[bool] = []
    for shard, values in zip(corpus.shards, expected, strict=True):
        rows = values[1:].reshape(-1, 8)
        lacks = [bool(np.isnan(row).any()) for row in rows]
        scored.extend(not lack for lack in lacks)
        rows[lacks] = np.nan
        if shard.index in {s.index for s in references.shards if "logprobs" in s.sha256}:
            np.testing.assert_array_equal(references.column("logprobs", shard.index), values)
    assert references.scored.tolist() == scored and 0 < sum(scored) < len(scored)
    windows = Windows(corpus, [references], partial=True)
    assert windows.available[:].tolist() == np.flatnonzero(scored).tolist()
    windows.batch(windows.available[:])
    assert all(whole for _, whole, _ in verify(tmp_path / "r"))


def test_stores_are_merged_or_given_together(tmp_path, tokenizer, reference, part, by_text):
    other = corpus_of(tmp_path / "o", ["something else here", END], tokenizer)
    one = score_into(tmp_path / "s", other, reference)
    texts = [TEXTS[2], "something else here", *TEXTS[6:], END]
    corpus = corpus_of(tmp_path, texts, tokenizer)
    with pytest.raises(UserError, match="documents have no scores"):
        bind_scores(corpus, part.folder.parent, tmp_path / "r")
    both = bind_scores(corpus, [part.folder.parent, tmp_path / "s"], tmp_path / "r")
    same(both, laid_out(corpus, texts, by_text | {texts[1]: documents_of(one)[0]}))
    shutil.copytree(part.folder, tmp_path / "s" / part.folder.name)
    merged = bind_scores(corpus, tmp_path / "s", tmp_path / "m")
    assert merged.fingerprint == both.fingerprint


def test_scores_of_two_references_are_not_mixed(tmp_path, tokenizer, part):
    other = corpus_of(tmp_path, [*TEXTS[:3], "end " * 9], tokenizer)
    score_into(tmp_path / "s", other, save_reference(tmp_path / "m", tokenizer, seed=1))
    with pytest.raises(UserError, match="are scores of two references: model_sha256 is"):
        bind_scores(other, [part.folder.parent, tmp_path / "s"], tmp_path / "r")


def test_the_document_that_the_end_has_cut_is_found_by_its_beginning(
    tmp_path, tokenizer, part, by_text
):
    """By no more than it: another that begins as it does, for a while, is not taken for it."""
    long = max(TEXTS, key=len)
    found = 0
    for length in (11, 13, 17):
        folder = tmp_path / str(length)
        corpus = corpus_of(folder, [TEXTS[0], long], tokenizer, seq_len=length)
        rest = sum(s.num_tokens for s in corpus.shards) - len(by_text[TEXTS[0]])
        if not 0 < rest < len(by_text[long]):
            continue
        if rest < 5:
            with pytest.raises(UserError, match="1 of 2 documents have no scores"):
                bind_scores(corpus, part.folder, folder / "r")
            continue
        same(
            bind_scores(corpus, part.folder, folder / "r"),
            laid_out(corpus, [TEXTS[0], long], by_text),
        )
        found += 1
        changed = long[: len(long) // 4] + "#" + long[len(long) // 4 + 1 :]
        other = corpus_of(folder / "x", [TEXTS[0], changed], tokenizer, seq_len=length)
        with pytest.raises(UserError, match="1 of 2 documents have no scores"):
            bind_scores(other, part.folder, folder / "q")
    assert found


def test_a_missing_document_that_was_cut_is_said(tmp_path, tokenizer, reference):
    """The store has its beginning, as far as the scored corpus goes; or it is one itself."""
    long = max(TEXTS, key=len) * 3
    scored = corpus_of(tmp_path / "one", [TEXTS[0], long], tokenizer, seq_len=11)
    tokens = Documents(scored).tokens(1)
    assert 0 < len(tokens) <= len(tokenizer.encode(long)) and len(tokens) % 11
    score_into(tmp_path / "s", scored, reference)
    whole = corpus_of(tmp_path / "two", [TEXTS[0], TEXTS[1], long, END], tokenizer)
    with pytest.raises(UserError) as raised:
        bind_scores(whole, tmp_path / "s", tmp_path / "r")
    said = str(raised.value).replace(str(tmp_path), "")
    own = r"the last one is a beginning itself, \d+ tokens up to the corpus's end"
    assert said.startswith(
        "3 of 4 documents have no scores in /s, e.g. /two/made/train: document 1 (record 1 of t) "
        "(of /two/made/train: document 2 (record 2 of t) a beginning is there: the corpus that was "
        "scored ends within it; the last one is"
    )
    assert re.search(rf"; {own}\): score them into it", said)
    other = corpus_of(tmp_path / "three", [TEXTS[0], "#" + long, END], tokenizer)
    with pytest.raises(UserError, match=rf"\({own}\): score them into it"):
        bind_scores(other, tmp_path / "s", tmp_path / "r")


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_another_tokenizer_by_bytes(tmp_path, tokenizer, kind):
    """Sums over each document agree, and over each run between boundaries that both have."""
    foreign = byte_level() if kind == "bytes" else byte_fallback()
    corpus = corpus_of(tmp_path, [*TEXTS, END, END], tokenizer)
    one = score_into(tmp_path / "s", corpus, save_reference(tmp_path / "m", foreign))
    texts = [*TEXTS[3:], *TEXTS[:3]]
    mixture = corpus_of(tmp_path / "x", [*texts, END], tokenizer, seq_len=16, shard_tokens=400)
    references = bind_scores(mixture, tmp_path / "s", tmp_path / "r")
    ours = np.concatenate([references.column("logprobs", i) for i in range(len(mixture.shards))])
    first = np.cumsum([0, *(shard.num_tokens for shard in mixture.shards)])[:-1]
    tokens = np.concatenate([mixture.column("tokens", i) for i in range(len(mixture.shards))])
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
    theirs = dict(zip(TEXTS, documents_of(one), strict=False))
    compared = 0
    for text, start, end in zip(texts, [0, *ends], ends, strict=False):
        if not np.isin(first, np.arange(start, end)).any():
            np.testing.assert_allclose(ours[start:end].sum(), theirs[text].sum(), rtol=2e-6)
            assert ours[end - 1] == theirs[text][-1]  # EOS to EOS
            compared += 1
    assert compared > 8 and not references.is_partial
    assert references.manifest["scoring"]["reference_tokenizer_sha256"]
    Windows(mixture, [references]).batch(np.arange(mixture.num_windows))


def test_killed_and_run_again_the_bytes_are_the_same(tmp_path, tokenizer, part, monkeypatch):
    corpus = corpus_of(tmp_path, [*TEXTS[::-1], END], tokenizer)
    whole = bind_scores(corpus, part.folder, tmp_path / "whole")
    own = Binder.write

    def killed(self, shard, *rest):
        if shard.index == 1:
            raise KeyboardInterrupt
        own(self, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Binder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            bind_scores(corpus, part.folder, tmp_path / "r")
    assert not (tmp_path / "r" / "manifest.json").exists()
    again = bind_scores(corpus, part.folder, tmp_path / "r")
    assert again.fingerprint == whole.fingerprint
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (tmp_path / "r" / path.name).read_bytes(), path.name


def test_other_scores_in_the_folder_and_no_store_are_refused(tmp_path, tokenizer, part):
    corpus = corpus_of(tmp_path, [*TEXTS[:6], END], tokenizer)
    bind_scores(corpus, part.folder, tmp_path / "r")
    with pytest.raises(
        UserError, match="holds another run: missing is 'refuse' in plan.json, 'skip'"
    ):
        bind_scores(corpus, part.folder, tmp_path / "r", missing="skip")
    with pytest.raises(UserError, match="kind is 'corpus', expected 'document_scores'"):
        bind_scores(corpus, corpus, tmp_path / "q")
    with pytest.raises(UserError, match="holds no scores of documents"):
        bind_scores(corpus, tmp_path / "nothing", tmp_path / "q")


def test_prompts_have_no_scores_and_special_tokens_within_a_chat_have(
    tmp_path, tokenizer, make_corpus, reference
):
    """Masked tokens stay in the context; stored in half precision they are what was stored."""
    ids, pad, eos = (
        tokenizer.encode("some words here"),
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    chat = [*ids, pad, *tokenizer.encode("an answer to them"), eos]
    live = [False] * (len(ids) + 1) + [True] * (len(chat) - len(ids) - 1)
    count = 5 * (len(chat) * 2 // 5) + 1
    stream, masks, starts = (chat * 3)[:count], (live * 3)[:count], [[0, len(chat)]]
    chats = make_corpus(tmp_path / "c", [stream], 5, starts=starts, masks=[masks])
    whole = make_corpus(tmp_path / "w", [stream], 5, starts=starts)
    part = score_into(tmp_path / "s", whole, reference, store_dtype="float16", context=99)
    scores = documents_of(part)[0]
    assert scores.dtype == np.float16 and len(scores) == len(chat)
    references = bind_scores(chats, tmp_path / "s", tmp_path / "r")
    expected = np.where(masks, np.resize(scores, count), np.nan).astype(np.float16)
    expected[0] = np.nan
    np.testing.assert_array_equal(references.column("logprobs", 0), expected)
    assert np.isnan(expected).sum() > len(ids) and not np.isnan(expected).all()
    assert all(whole for _, whole, _ in verify(tmp_path / "r"))
    Windows(chats, [references]).batch(np.arange(chats.num_windows))


def test_a_flipped_byte_is_found_where_it_is_asked_for(tmp_path, tokenizer, part):
    shutil.copytree(part.folder, tmp_path / "s" / "part")
    path = tmp_path / "s" / "part" / "logprobs-00000.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    corpus = corpus_of(tmp_path, [*TEXTS[:6], END], tokenizer)
    with pytest.raises(UserError, match="logprobs-00000.npy is damaged: sha256"):
        bind_scores(corpus, tmp_path / "s", tmp_path / "r", check="full")
    assert not (tmp_path / "r").exists()


def test_windows_without_a_missing_document_by_looking_at_each(tmp_path, tokenizer):
    corpus = corpus_of(tmp_path, [*TEXTS, END], tokenizer, seq_len=4, shard_tokens=30)
    documents = Documents(corpus)
    owner = np.repeat(np.arange(len(documents)), np.diff(documents.bounds))
    for seed in range(20):
        places = np.random.default_rng(seed).integers(-1, 3, len(documents))
        expected = [
            (places[owner[start + 1 + 4 * w : start + 5 + 4 * w]] >= 0).all()
            for start, count in zip(documents.before, corpus.windows_per_shard, strict=False)
            for w in range(count)
        ]
        assert whole_windows(documents, places).tolist() == expected


def test_a_store_that_grew_is_bound_again_over_its_own_files(
    tmp_path, tokenizer, reference, part, by_text
):
    """Windows are added; what there is equals what one bind of the whole store makes."""
    shutil.copytree(part.folder, tmp_path / "s" / "first")
    texts = [*TEXTS[:5], "nobody has scored this", *TEXTS[5:], END]
    corpus = corpus_of(tmp_path, texts, tokenizer)
    some = bind_scores(corpus, tmp_path / "s", tmp_path / "r", missing="skip")
    whole = bind_scores(corpus_of(tmp_path / "o", [*TEXTS, END], tokenizer), part, tmp_path / "q")
    assert some.is_partial and not whole.is_partial
    added = documents_of(score_into(tmp_path / "s", corpus, reference))[0]
    grown = bind_scores(corpus, tmp_path / "s", tmp_path / "r", missing="skip")
    same(grown, laid_out(corpus, texts, by_text | {texts[5]: added}))
    at_once = bind_scores(corpus, tmp_path / "s", tmp_path / "a", missing="skip")
    assert grown.fingerprint == at_once.fingerprint and not grown.is_partial
    manifests = [read_json(one.folder / "manifest.json") for one in (grown, at_once)]
    assert manifests[0] == manifests[1] and len(manifests[0]["scores"]) == 2
    again = bind_scores(tmp_path / "o" / "made" / "train", tmp_path / "s", tmp_path / "q")
    assert again.fingerprint == whole.fingerprint
    assert all(whole for _, whole, _ in verify(tmp_path))
    with pytest.raises(UserError, match="r holds another run: scores is"):  # one of them is gone
        bind_scores(corpus, part, tmp_path / "r", missing="skip")


def test_missing_documents_are_scored_into_the_store_first(
    tmp_path, tokenizer, reference, part, by_text
):
    shutil.copytree(part.folder, tmp_path / "s" / "first")
    texts = ["nobody has scored this", *TEXTS, END]
    corpus = corpus_of(tmp_path, texts, tokenizer)
    made = bind_scores(
        corpus, tmp_path / "s", tmp_path / "r", missing="score", reference_model=reference
    )
    (new,) = [one for one in open_parts([str(tmp_path / "s")]) if one.folder.name != "first"]
    assert new.manifest["corpus_fingerprint"] == corpus.fingerprint
    same(made, laid_out(corpus, texts, by_text | {texts[0]: documents_of(new)[0]}))
    plain = bind_scores(corpus, tmp_path / "s", tmp_path / "p")
    assert read_json(plain.folder / "plan.json") == read_json(made.folder / "plan.json")
    given: dict[str, Any] = {"missing": "score", "reference_model": reference}
    stores = [tmp_path / "s", part.folder.parent]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"missing": "score"}, "missing is 'score' and reference_model null: missing=score needs"),
        ({"reference_model": reference}, "missing is 'refuse' and reference_model '.*model'"),
        ({**given, "scores": stores}, "missing is 'score' and scores has 2 stores"),
    ]
    for more, sentence in refused:
        asked: dict[str, Any] = {"corpus": corpus, "scores": stores[0], "out": tmp_path / "x"}
        with pytest.raises(UserError, match=sentence):
            bind_scores(**asked | more)


def test_a_run_reads_what_is_left_as_often_as_it_likes(tmp_path, tokenizer, part):
    texts = [*TEXTS[:5], "nobody has scored this", *TEXTS[5:], END]
    corpus = corpus_of(tmp_path, texts, tokenizer)
    references = bind_scores(corpus, part, tmp_path / "r", missing="skip")
    have = int(references.scored.sum())
    data = TokenData(str(corpus.folder), str(references.folder), None, None, 1, 2, 2, 0, "size", 0)
    assert 0 < have < corpus.num_windows
    check_scored(3 * corpus.num_windows * corpus.seq_len, data)
    windows, _ = Order(len(data.windows.available), 0).samples(0, 3 * have)
    counts = np.bincount(data.windows.available[windows], minlength=corpus.num_windows)
    assert counts.tolist() == (3 * references.scored).tolist()
