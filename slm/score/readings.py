"""The documents of a corpus as a reference model reads them: in its own tokens."""

from collections.abc import Iterable, Iterator
from os.path import commonprefix
from typing import Any, NamedTuple, NoReturn
from unicodedata import normalize

import numpy as np

from slm.prepare.encoder import Encoder, encoder_state
from slm.score.texts import Text, Texts, Unreadable
from slm.store.document_scores import SPECIAL
from slm.store.documents import Documents


class Reading(NamedTuple):
    text: Text
    tokens: np.ndarray  # (n,) of the reference's tokenizer, EOS included
    sizes: np.ndarray  # (n,): bytes of each


class OwnTokens:
    """The model has the corpus's tokenizer: the tokens are there."""

    key = "ids"

    def __init__(self, documents: Documents, tokenizer: Any):
        self.documents, self.texts = documents, Texts(documents)

    def keys(self) -> Iterable[bytes]:
        return self.documents.ids_sha256(self.texts.state.token_dtype)

    def read(self, document: int) -> Reading:
        """Without its text it is known by its tokens alone: to corpora of the same tokenizer."""
        tokens = self.documents.tokens(document)
        try:
            text = self.texts.read(document)
        except Unreadable:
            text = Text(b"", np.zeros(len(tokens), np.int64), True, SPECIAL + tokens.tobytes())
        return Reading(text, tokens, text.sizes)


class OtherTokens:
    """The model reads the text with its own tokenizer, and EOS at its end."""

    key = "texts"

    def __init__(self, documents: Documents, tokenizer: Any):
        self.documents, self.texts = documents, Texts(documents)
        self.encoder = Encoder(encoder_state(tokenizer))
        self.unknown_id = tokenizer.unk_token_id

    def keys(self) -> Iterator[bytes]:
        """Nothing for a document without a text: it is said of it when it is read."""
        for document in range(len(self.documents)):
            try:
                yield self.texts.read(document).sha256
            except Unreadable:
                yield b"%d" % document

    def read(self, document: int) -> Reading:
        text = self.texts.read(document)
        plain = self.plain(document, text)
        data = plain.encode()
        made = self.encoder.encode([plain], np.array([len(data)]))
        if made.faults:
            self.refuse(document, made.faults[0])
        self.check_changes(document, plain)
        count = int(made.lengths[0]) - (not text.is_whole)
        if self.unknown_id is not None and (made.tokens[:count] == self.unknown_id).any():
            self.refuse(document, "it holds text that the reference's tokenizer has no token for")
        return Reading(text, made.tokens[:count], made.sizes[:count].astype(np.int64))

    def plain(self, document: int, text: Text) -> str:
        if SPECIAL in text.data:
            name = text.data.split(SPECIAL)[1].decode(errors="replace")
            self.refuse(
                document, f"it holds the special token {name!r}: another tokenizer has none"
            )
        try:  # a document that was cut may end within a character
            return text.data.decode("utf-8", "strict" if text.is_whole else "ignore")
        except UnicodeDecodeError as error:
            self.refuse(document, f"its text is no UTF-8 ({error.reason} at byte {error.start})")

    def check_changes(self, document: int, text: str) -> None:
        """A normalizer may spell characters in another normal form: these stay the same text."""
        normalizer: Any = self.encoder.backend.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        if not self.encoder.state.byte_level:  # spaces, one of which may stand in front
            normal = normal.replace("\u2581", " ")
        if normal in (text, f" {text}"):
            return
        ours, theirs = normalize("NFC", text), normalize("NFC", normal)
        theirs = theirs.removeprefix(" ") if not ours.startswith(" ") else theirs
        if ours != theirs and " " + ours != theirs:
            at = len(commonprefix([ours, theirs]))
            self.refuse(
                document,
                "the reference's tokenizer reads another text: "
                f"{ours[at : at + 12]!r} at character {at} becomes {theirs[at : at + 12]!r}",
            )

    def refuse(self, document: int, why: str) -> NoReturn:
        raise Unreadable(f"{self.documents.name(document)}: {why}")
