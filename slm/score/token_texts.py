r"""Is a text that a server wrote for a token that token's? Servers write them in different ways.

As the decoded token, as the vocabulary's entry, as `token_id:7` (vLLM), as `bytes:\xe2\x80`
(OpenAI) or, where a token is a part of a character, as U+FFFD, or as nothing until the character is
whole (vLLM). Text cannot tell apart two tokens that a server writes alike: parts of characters as
U+FFFD or as nothing, which are counted, and with SentencePiece-like tokenizers a word with and
without its space, where the decoded token has lost it.
"""

import codecs
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from slm.store.tokenizer import byte_alphabet, byte_characters


def vocabulary_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """The bytes that each token id stands for; of special tokens their text."""
    byte_level, _ = byte_alphabet(tokenizer)
    characters = {character: byte for byte, character in enumerate(byte_characters())}
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    found = {index: text.encode() for index, text in added.items()}
    for piece, index in tokenizer.get_vocab().items():
        if index in added:
            continue
        if byte_level:
            found[index] = bytes(characters[character] for character in piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            found[index] = bytes.fromhex(piece[3:5])
        else:
            found[index] = piece.replace("\u2581", " ").encode()
    return found


def literal_bytes(text: str) -> bytes | None:
    r"""`bytes:\xe2\x80` -> b"\xe2\x80"; None for what is no such literal."""
    if not text.startswith("bytes:"):
        return None
    try:
        return text.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return None


def whole_characters(pieces: Sequence[bytes]) -> list[str]:
    """A character that is split over tokens is the text of the token that completes it.

    Bytes that are no UTF-8 are U+FFFD; so is the end of the last token where it is not complete.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece) for piece in pieces]
    return [*texts[:-1], texts[-1] + decoder.decode(b"", final=True)] if texts else []


class TokenTexts:
    """Compares the texts of tokens with token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.bytes = tokenizer, vocabulary_bytes(tokenizer)
        self.spellings: dict[int, set[str]] = {}
        self.num_partial = 0  # compared as parts of a character that the server does not show

    def known(self, token: int) -> set[str]:
        if token not in self.spellings:
            piece, decoded = (
                self.tokenizer.convert_ids_to_tokens(token),
                self.tokenizer.decode([token]),
            )
            text = self.bytes[token].decode(errors="replace")
            self.spellings[token] = {str(piece), str(decoded), text, f"token_id:{token}"}
        return self.spellings[token]

    def first_other(self, texts: Sequence[Any], ids: list[int]) -> int | None:
        """Position of the first text that is not its token's."""
        whole = codecs.getincrementaldecoder("utf-8")("replace")
        for position, (text, token) in enumerate(zip(texts, ids, strict=True)):
            completed = whole.decode(self.bytes[token])  # "" until a character is whole
            if not isinstance(text, str):
                return position
            if text not in self.known(token) and text != completed:
                if literal_bytes(text) != self.bytes[token]:
                    return position
            self.num_partial += text == "" or "\ufffd" in text
        return None

    def describe(self, token: int) -> str:
        return f"{token} {self.bytes[token].decode(errors='backslashreplace')!r}"
