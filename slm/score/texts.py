"""The text that the tokens of a document spell.

A corpus keeps no text. Byte-level vocabularies, and those with byte fallback, spell it by bytes:
what a normalizer had changed (NFC, a literal ▁ of SentencePiece's) is spelled as the model of
that tokenizer reads it. Of other vocabularies the text is decoded, and believed where it encodes to
the same tokens again.
"""

import hashlib
from functools import cached_property
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.encoder import Encoder, encoder_state
from slm.score.token_texts import vocabulary_bytes
from slm.store.document_scores import CUT, SPECIAL
from slm.store.documents import Documents
from slm.store.tokenizer import load_corpus_tokenizer


class Unreadable(UserError):
    """A document that this reference cannot score; the others can be."""


class Text(NamedTuple):
    """A document: `data` is its text, with each special token in it as SPECIAL name SPECIAL."""

    data: bytes
    sizes: np.ndarray  # (n,): bytes of each token in `data`; 0 for the EOS at its end
    is_whole: bool  # it ends with EOS; what a corpus dropped at its end may have cut the last one
    ids: bytes = b""  # its tokens, where nothing is known but these

    @property
    def sha256(self) -> bytes:
        end = b"" if self.is_whole else CUT
        return hashlib.sha256(self.data + self.ids + end).digest()


class Texts:
    """What the documents of a corpus spell; a special token in them spells its name, or nothing."""

    def __init__(self, documents: Documents, *, names_special: bool = True):
        self.documents, corpus = documents, documents.corpus
        self.tokenizer, self.eos_id = load_corpus_tokenizer(corpus), corpus.manifest["eos_id"]
        self.state = encoder_state(self.tokenizer)
        self.is_special = (self.state.bytes_table == 0) & self.state.is_added
        found, size = vocabulary_bytes(self.tokenizer), self.state.vocab_size
        self.pieces = [found[index] if index in found else b"" for index in range(size)]
        for index in np.flatnonzero(self.is_special):
            self.pieces[index] = SPECIAL + self.pieces[index] + SPECIAL if names_special else b""
        self.lengths = np.array([len(piece) for piece in self.pieces])

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.state)

    def read(self, document: int) -> Text:
        """Unreadable where the tokens do not spell the text."""
        tokens = self.documents.tokens(document)
        sizes = self.documents.column("bytes", document).astype(np.int64)
        is_whole = int(tokens[-1]) == self.eos_id
        count = len(tokens) - is_whole
        if self.state.table_is_exact:
            data, sizes[:count] = self.spelled(tokens[:count], sizes[:count])
        elif (data := self.decoded(tokens, sizes, count)) is None:
            raise Unreadable(
                f"{self.documents.name(document)}: its {len(tokens)} tokens do not spell its text "
                f"of {sizes.sum()} bytes"
            )
        sizes[count:] = 0
        return Text(data, sizes, is_whole)

    def spelled(self, tokens: np.ndarray, sizes: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Byte by byte. A tokenizer may have put a space in front, which is no byte of the text.

        Where the corpus counts other bytes otherwise, a normalizer has changed the text.
        """
        pieces, found = [self.pieces[token] for token in tokens.tolist()], self.lengths[tokens]
        is_special = self.is_special[tokens]
        is_first = np.append(True, is_special)[: len(tokens)] & ~is_special
        for at in np.flatnonzero(is_first & (sizes == found - 1)).tolist():
            pieces[at] = pieces[at].removeprefix(b" ")
            found[at] = len(pieces[at])
        return b"".join(pieces), found

    def decoded(self, tokens: np.ndarray, sizes: np.ndarray, count: int) -> bytes | None:
        """By the tokenizer's decoder, where the text encodes to these tokens again."""
        if self.is_special[tokens[:count]].any():
            return None
        text = str(self.tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False))
        data = text.encode()
        again = self.encoder.encode([text], np.array([len(data)]))
        same = np.array_equal(again.tokens[: again.lengths[0] - 1], tokens[:count])
        return data if same and np.array_equal(again.sizes[:-1], sizes[:count]) else None
