"""Every way in which a server may write a token, and what is none of them."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from slm.score.token_texts import TokenTexts, literal_bytes, vocabulary_bytes, whole_characters


def test_bytes_of_the_vocabulary_are_those_of_the_text(tokenizer):
    found = vocabulary_bytes(tokenizer)
    text = "def f():\n\t\u00e4\u20ac\U0001f600 caf\u00e9"
    assert b"".join(found[i] for i in tokenizer.encode(text)) == text.encode()
    assert found[tokenizer.eos_token_id] == b"<|endoftext|>"


def test_every_way_to_write_a_token(tokenizer):
    ids = tokenizer.encode("a \u20ac")
    whole, parts = ids[0], ids[-3:]
    texts = TokenTexts(tokenizer)
    assert [texts.bytes[i] for i in parts] == [b"\xe2", b"\x82", b"\xac"]
    assert texts.first_other(["a", f"token_id:{whole}"], [whole, whole]) is None
    names = tokenizer.convert_ids_to_tokens(parts)
    literal = ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    completed = ["", "", "\u20ac"]
    for written in (names, literal, ["\ufffd"] * 3, completed, [literal[0], "", "\u20ac"]):
        assert texts.first_other(written, parts) is None, written
    for wrong, position in [
        (["", "\u20ac", ""], 1),
        ([literal[0], literal[2], literal[1]], 1),
        (["", "", "\u20ad"], 2),
        (["", "", None], 2),
        (["a", "", "\u20ac"], 0),
    ]:
        assert texts.first_other(wrong, parts) == position, wrong


def test_literal_bytes():
    assert literal_bytes("bytes: \\xf0\\x9f") == b" \xf0\x9f"
    assert literal_bytes("bytes:\\x") is None and literal_bytes("\\xf0") is None


@pytest.fixture
def llama_like() -> PreTrainedTokenizerFast:
    """Byte fallback; the decoder takes the first space away, as Llama's does."""
    vocab = {"<unk>": 0, "</s>": 1, "\u2581": 2, "a": 3, "\u2581a": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    model = models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_a_word_may_have_lost_its_space_and_a_byte_be_an_entry(llama_like):
    texts = TokenTexts(llama_like)
    assert [texts.bytes[i] for i in (1, 3, 4, 5 + 0xE2)] == [b"</s>", b"a", b" a", b"\xe2"]
    for written in (" a", "a", "\u2581a", "token_id:4"):
        assert texts.first_other([written], [4]) is None, written
    assert texts.first_other([" a"], [3]) == 0  # the other way round is another token
    euro = [5 + byte for byte in "\u20ac".encode()]
    for written in (["<0xE2>", "<0x82>", "<0xAC>"], ["", "", "\u20ac"], ["\ufffd"] * 3):
        assert texts.first_other(written, euro) is None, written
    assert texts.num_partial == 2 + 3
    assert texts.first_other(["<0xE2>", "<0x83>", "<0xAC>"], euro) == 1


def test_a_split_character_is_text_of_the_token_that_completes_it():
    text = "a\u00e9\U0001f600b"
    data = text.encode()
    pieces = [data[:2], data[2:4], data[4:6], data[6:]]
    assert whole_characters(pieces) == ["a", "\u00e9", "", "\U0001f600b"]
    assert whole_characters(pieces[:3]) == ["a", "\u00e9", "\ufffd"]  # cut within a character
    assert whole_characters(pieces[1:]) == ["\ufffd", "", "\U0001f600b"]
    assert whole_characters([]) == []
