"""The text of a corpus's documents, under tokenizers of every kind, whole and cut."""

import hashlib

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers

from document_helpers import END, TEXTS, byte_fallback, corpus_of, normalized, words
from slm.score.texts import Texts, Unreadable
from slm.store.documents import Documents

WORDS = ["ab cd", "cd", "ab ab cd", "cd ab " * 9 + "ab"]


def read(corpus) -> list:
    texts = Texts(Documents(corpus))
    return [texts.read(number) for number in range(len(texts.documents))]


@pytest.mark.parametrize("kind", ["bytes", "prefix space", "fallback"])
def test_texts_are_what_was_prepared(tmp_path, tokenizer, kind):
    if kind == "fallback":
        tokenizer = byte_fallback()
    if kind == "prefix space":
        tokenizer = normalized(tokenizer, normalizers.NFD())
        tokenizer.backend_tokenizer.normalizer = None  # type: ignore[assignment]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = read(corpus_of(tmp_path, [*TEXTS, END], tokenizer))
    assert [text.data.decode() for text in found[: len(TEXTS)]] == TEXTS
    for text in found:
        assert text.sizes.sum() == len(text.data)
        assert text.is_whole == (text is not found[-1])
    assert END.startswith(found[-1].data.decode())
    assert found[0].sha256 == hashlib.sha256(TEXTS[0].encode()).digest()
    assert found[-1].sha256 == hashlib.sha256(found[-1].data + b"\xff").digest()


def test_other_vocabularies_are_decoded_and_believed_where_that_encodes_again(tmp_path):
    found = read(corpus_of(tmp_path / "a", WORDS, words(False), seq_len=2))
    assert [text.data.decode() for text in found[:3]] == WORDS[:3]
    texts = Texts(Documents(corpus_of(tmp_path / "b", WORDS, words(True), seq_len=2)))
    assert texts.read(1).data == b"cd"
    with pytest.raises(
        Unreadable, match=r"document 0 \(record 0 of t\): its 3 tokens do not spell"
    ):
        texts.read(0)
    assert np.diff(texts.documents.bounds)[:3].tolist() == [3, 2, 4]


def test_what_a_normalizer_has_changed_is_the_text_as_the_tokens_spell_it(tmp_path, tokenizer):
    nfc = read(corpus_of(tmp_path / "a", [TEXTS[5], END], normalized(tokenizer, normalizers.NFC())))
    assert nfc[0].data.decode() == "\u00e9 decomposed" and nfc[0].sizes.sum() == len(nfc[0].data)
    found = read(corpus_of(tmp_path / "b", ["a \u2581 text", END], byte_fallback()))
    assert found[0].data.decode() == "a   text" and found[0].sizes.sum() == 8
