"""What a reference of another tokenizer reads: the text itself, or nothing."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from document_helpers import END, TEXTS, byte_fallback, byte_level, corpus_of, normalized
from slm.score.readings import OtherTokens, OwnTokens
from slm.score.texts import Unreadable
from slm.store.documents import Documents
from slm.store.shards import Corpus


@pytest.fixture(scope="module")
def documents(tmp_path_factory, tokenizer) -> Documents:
    texts = [*TEXTS, "a \u2581 of its own", "\ufb01 and  \uff11", END]
    return Documents(corpus_of(tmp_path_factory.mktemp("c"), texts, tokenizer))


def fallback_with_unknown() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "of": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def refused(documents: Documents, tokenizer) -> dict[int, str]:
    reader, found = OtherTokens(documents, tokenizer), {}
    for number in range(len(documents)):
        try:
            reading = reader.read(number)
        except Unreadable as error:
            found[number] = str(error)
        else:
            assert reading.sizes.sum() == len(reading.text.data)  # every byte has a token
    return found


def test_bytes_of_any_text_are_read(documents):
    assert refused(documents, byte_level()) == {}


def test_what_a_sentencepiece_like_tokenizer_cannot_tell_apart_is_refused(documents):
    (found,) = refused(documents, byte_fallback()).items()
    assert found[0] == 14
    assert found[1].endswith(
        "document 14 (record 14 of t): the reference's tokenizer reads another text: "
        "'\u2581 of its own' at character 2 becomes '  of its own'"
    )


def test_one_normal_form_for_another_is_the_same_text(documents):
    nfc = normalized(byte_level(), normalizers.NFC())
    assert refused(documents, nfc) == {}
    reading = OtherTokens(documents, nfc).read(5)  # e, accent
    assert reading.text.data == TEXTS[5].encode()
    composed = nfc.encode("\u00e9 decomposed")
    assert reading.tokens[:-1].tolist() == composed and len(composed) < reading.sizes.sum()


def test_a_lossy_normalizer_is_found(documents):
    assert refused(documents, normalized(byte_level(), normalizers.NFKC())).keys() == {15}
    found = refused(documents, normalized(byte_level(), normalizers.Lowercase()))
    assert found.keys() == {3} and "'Z\u00fcrich" in found[3] and "becomes 'z\u00fcrich" in found[3]
    spaces = normalizers.Replace("  ", " ")
    assert refused(documents, normalized(byte_level(), spaces)).keys() == {3, 15}


def test_text_without_a_token_is_refused(documents):
    found = refused(documents, fallback_with_unknown())
    assert found.keys() == set(range(len(documents)))
    assert found[0].endswith("it holds text that the reference's tokenizer has no token for")


def test_a_chat_is_scored_by_its_own_tokenizer_alone(tmp_path, make_corpus, tokenizer):
    """A special token within it is in its hash, and in no text."""
    ids, eos = tokenizer.encode("some words"), tokenizer.eos_token_id
    chat = [*ids, tokenizer.pad_token_id, *ids, eos]
    stream = np.array([*chat, *ids, eos] * 3)
    n, m = len(chat), len(ids) + 1
    starts = [[0, n, n + m, 2 * n + m, 2 * n + 2 * m, 3 * n + 2 * m]]
    corpus: Corpus = make_corpus(Path(tmp_path) / "c", [stream], 5, starts=starts)
    chats = Documents(corpus)
    own = OwnTokens(chats, tokenizer).read(0)
    assert own.text.data == b"some words\xff<|pad|>\xffsome words" and own.text.is_whole
    assert own.sizes.sum() == len(own.text.data) and own.tokens.tolist() == chat
    with pytest.raises(Unreadable, match=r"special token '<\|pad\|>': another tokenizer has none"):
        OtherTokens(chats, byte_level()).read(0)
    assert OtherTokens(chats, byte_level()).read(1).text.data == b"some words"
