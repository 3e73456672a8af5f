"""Texts to tokens, and how many bytes of text each token stands for.

An `EncoderState` is all that the workers of `slm prepare` get: `tokenizers` reads it, and
`transformers`, whose import costs two seconds and 400 MB each, is not needed. Where it was proven
(`slm.prepare.proof`), gigatoken makes the ids, which is many times faster.
"""

from __future__ import annotations

import importlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slm.prepare.offsets import bytes_by_offsets, fit
from slm.store.files import Json
from slm.store.tokenizer import byte_alphabet, first_line, is_panic, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# A longer text is encoded in pieces of about so many characters: an encoding is 150 times its text.
PIECE_CHARACTERS = 2**16
# gigatoken keeps every word that it has seen, some 100 bytes each, until it is made anew (0.1 s).
KEPT_CHARACTERS = 2**28
# The pre-tokenizers of GPT-2, Llama 3, Qwen 2 and GPT-4o: none joins what SAFE_CUT parts, a letter
# or digit and the space (or line end) after it, and what they find goes by nothing left of it.
WORDS = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
LLAMA = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{WORDS}"
KNOWN_SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    LLAMA,
    LLAMA.replace("{1,3}", ""),
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{ENDINGS}?|"
    + WORDS.replace("[\\r\\n]*", "[\\r\\n/]*"),
}
SAFE_CUT = re.compile(r"(?<=[^\W_])(?= )|(?<=[A-Za-z0-9\u4e00-\u9fa5])(?=\n)")
# What stands before a text in its document: nothing, a special token, other text.
AT_START, AFTER_SPECIAL, AFTER_TEXT = 0, 1, 2


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes that each token id stands for; special tokens 0. Shape (vocab,), int64.

    Exact for byte-level vocabularies (one character a byte) and for SentencePiece-like ones with
    byte fallback, where the text is not normalized; `Encoder` counts by offsets everywhere else.
    """
    byte_level, _ = byte_alphabet(tokenizer)
    sizes = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        if byte_level:
            sizes[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    for index, added in tokenizer.added_tokens_decoder.items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    sizes[tokenizer.all_special_ids] = 0
    return sizes


@dataclass(frozen=True)
class EncoderState:
    """What an `Encoder` is made of; small enough to be sent to a worker process."""

    backend: str  # tokenizer.json
    eos_id: int
    vocab_size: int
    bytes_table: np.ndarray  # (vocab,): `token_bytes`
    byte_level: bool
    table_is_exact: bool
    starts_with_space: np.ndarray  # (vocab,): a tokenizer may have put that space there itself
    is_added: np.ndarray  # (vocab,): such a token may take the spaces around it; the unknown one
    # (0x110000 / 8,) uint8, a bit a code point: texts of these alone have the same ids from
    # gigatoken; None: `tokenizers` encodes all
    proven: np.ndarray | None = None

    @property
    def token_dtype(self) -> str:
        return "uint16" if self.vocab_size <= 65536 else "uint32"

    @property
    def bytes_dtype(self) -> str:
        fits = self.table_is_exact and self.bytes_table.max() <= 255
        return "uint8" if fits else "uint16"


def encoder_state(tokenizer: PreTrainedTokenizerFast) -> EncoderState:
    size, eos_id = vocabulary_size(tokenizer), tokenizer.eos_token_id
    assert isinstance(eos_id, int), f"one EOS token is needed, found {eos_id!r}"
    byte_level, byte_fallback = byte_alphabet(tokenizer)
    starts_with_space = np.zeros(size, dtype=bool)
    for token, index in tokenizer.get_vocab().items():
        starts_with_space[index] = token.startswith(("\u0120", "\u2581"))
    is_added = np.zeros(size, dtype=bool)
    is_added[list(tokenizer.added_tokens_decoder)] = True
    return EncoderState(
        backend=tokenizer.backend_tokenizer.to_str(),
        eos_id=eos_id,
        vocab_size=size,
        bytes_table=token_bytes(tokenizer),
        byte_level=byte_level,
        table_is_exact=byte_level or byte_fallback,
        starts_with_space=starts_with_space,
        is_added=is_added,
    )


class Encoded(NamedTuple):
    tokens: np.ndarray  # (n,)
    sizes: np.ndarray  # (n,): bytes of each token
    lengths: np.ndarray  # (d,): tokens of each text, EOS included
    faults: dict[int, str]  # text -> why its tokens must not be used


def make_backend(state: str) -> Tokenizer:
    from tokenizers import Tokenizer

    backend: Tokenizer = Tokenizer.from_str(state)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def make_fast(state: str) -> Any:
    """gigatoken's tokenizer, to which special strings in a text are text: it is told of none."""
    gigatoken = importlib.import_module("gigatoken")  # of the extra of this name
    return gigatoken.Tokenizer.from_json(without_special(state))


@lru_cache(maxsize=2)
def without_special(state: str) -> str:
    settings = json.loads(state)
    added = [token for token in settings["added_tokens"] if not token["special"]]
    return json.dumps(settings | {"added_tokens": added})


def continue_at(place: int, step: Json | None) -> Json | None:
    """A normalizer or pre-tokenizer that puts no space where the whole document has none."""
    if step is None:
        return None
    for name in ("normalizers", "pretokenizers"):
        if step["type"] == "Sequence" and name in step:
            inner = [continue_at(place, one) for one in step[name]]
            return step | {name: [one for one in inner if one is not None]}
    anywhere = place == AFTER_TEXT
    if step["type"] == "Metaspace" and (anywhere or step["prepend_scheme"] == "first"):
        return step | {"prepend_scheme": "never"}
    if step["type"] == "Prepend" and anywhere:
        return None
    if "add_prefix_space" in step and anywhere:
        return step | {"add_prefix_space": False}
    return step


def has_safe_cuts(state: Json) -> bool:
    """Is a text cut at SAFE_CUT the same tokens? Sure for byte-level BPE of the known splits."""
    step, model = state["pre_tokenizer"], state["model"]
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    if not all(map(is_known_split, steps)) or not any(
        s["type"] == "Split" or s["use_regex"] for s in steps
    ):
        return False
    if state["normalizer"] not in (None, {"type": "NFC"}):
        return False
    added = [token for token in state["added_tokens"] if not token["special"]]  # these stay whole
    joins = any(token["rstrip"] or re.search(r"\S\s", token["content"]) for token in added)
    return not joins and model["type"] == "BPE" and not model["dropout"]


def is_known_split(step: Json | None) -> bool:
    if step is None or step["type"] not in ("Split", "ByteLevel"):
        return False
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    known = step["pattern"] in [{"Regex": pattern} for pattern in KNOWN_SPLITS]
    return known and step["behavior"] == "Isolated" and not step["invert"]


def cut_text(text: str) -> Iterator[str]:
    """Pieces of about PIECE_CHARACTERS that end where a pre-tokenizer surely cuts."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        match = SAFE_CUT.search(text, start + PIECE_CHARACTERS)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def encode_batch(backend: Tokenizer, texts: list[str]) -> list[array[int] | str]:
    """Ids without special tokens; a sentence for a text that the backend panics at."""
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [array("I", encoding.ids) for encoding in encodings]
    except BaseException as error:
        if not is_panic(error):
            raise
        if len(texts) == 1:
            return [f"the tokenizer gives up on the text ({first_line(error)})"]
    return [encoded for text in texts for encoded in encode_batch(backend, [text])]


class Encoder:
    """Encodes texts without special tokens; special-token strings in a text are ordinary text."""

    def __init__(self, state: EncoderState):
        self.state = state
        self.backend = make_backend(state.backend)
        self.kept = 0  # characters of which `fast` may keep the words

    @cached_property
    def spellings(self) -> list[str]:
        """For each place of a text; the same one where the tokenizer puts no space in front."""
        state, made = json.loads(self.state.backend), [self.state.backend]
        for place in (AFTER_SPECIAL, AFTER_TEXT):
            steps = {key: continue_at(place, state[key]) for key in ("normalizer", "pre_tokenizer")}
            same = steps.items() <= state.items()
            made.append(self.state.backend if same else json.dumps(state | steps))
        return made

    @cached_property
    def backends(self) -> list[Tokenizer]:
        """For each place."""
        own = self.state.backend
        return [self.backend if one == own else make_backend(one) for one in self.spellings]

    @cached_property
    def fast(self) -> list[Any]:
        """gigatoken's for each place."""
        made = {one: make_fast(one) for one in set(self.spellings)}
        return [made[one] for one in self.spellings]

    @cached_property
    def proven(self) -> np.ndarray:  # (0x110000,) bool
        assert self.state.proven is not None, "nothing is proven of gigatoken"
        return np.unpackbits(self.state.proven).astype(bool)

    def is_proven(self, text: str) -> bool:
        """Has it proven code points alone? Every ASCII one is."""
        if text.isascii():
            return True
        return bool(self.proven[np.frombuffer(text.encode("utf-32-le"), np.uint32)].all())

    def encode_fast(self, texts: list[str], places: list[int]) -> dict[int, Sequence[int]]:
        """Ids of the texts that gigatoken encodes."""
        found: dict[int, Sequence[int]] = {}
        for i, (text, place) in enumerate(zip(texts, places, strict=True)):
            if self.is_proven(text):
                found[i] = self.fast[place].encode(text)
                self.kept += len(text)
        if self.kept > KEPT_CHARACTERS:
            del self.fast
            self.kept = 0
        return found

    @cached_property
    def can_cut(self) -> bool:
        return has_safe_cuts(json.loads(self.state.backend))

    def encode_each(
        self, texts: list[str], places: list[int] | None
    ) -> Iterator[Sequence[int] | str]:
        """Ids of the texts in their order, or why there are none; AT_START without `places`."""
        places = [AT_START] * len(texts) if places is None else places
        found: dict[int, Sequence[int] | str] = {}
        if self.state.proven is not None:
            found |= self.encode_fast(texts, places)
        rest = [i for i in range(len(texts)) if i not in found]
        long = {i for i in rest if len(texts[i]) > 2 * PIECE_CHARACTERS and self.can_cut}
        for place in {places[i] for i in rest}:
            mine = [i for i in rest if places[i] == place and i not in long]
            encodings = encode_batch(self.backends[place], [texts[i] for i in mine])
            found |= zip(mine, encodings, strict=True)
        for i, text in enumerate(texts):
            yield self.encode_long(text) if i in long else found.pop(i)

    def encode_long(self, text: str) -> array[int] | str:
        """In pieces; what can be cut has no space put in front, whatever its place."""
        ids = array("I")
        for piece in cut_text(text):
            (found,) = encode_batch(self.backend, [piece])
            if isinstance(found, str):
                return found
            ids.extend(found)
        return ids

    def encode(
        self,
        texts: list[str],
        num_bytes: np.ndarray,  # (d,): UTF-8 bytes of each text
        places: list[int] | None = None,  # of each text: AT_START, AFTER_SPECIAL, AFTER_TEXT
    ) -> Encoded:
        """Tokens of all texts in one array, EOS after each, and the bytes that each stands for."""
        eos = np.array([self.state.eos_id], np.uint32)
        pieces, lengths, unread = [], np.empty(len(texts), dtype=np.int64), {}
        for i, found in enumerate(self.encode_each(texts, places)):
            if isinstance(found, str):
                unread[i], found = found, eos  # some token, for its bytes
            pieces += [np.asarray(found, np.uint32), eos]
            lengths[i] = len(found) + 1
        tokens = np.concatenate(pieces)
        faults = self.find_faults(tokens, lengths, num_bytes) | unread
        sizes = self.count_bytes(texts, num_bytes, tokens, lengths, faults, places)
        return Encoded(
            tokens.astype(self.state.token_dtype),
            sizes.astype(self.state.bytes_dtype),
            lengths,
            faults,
        )

    def find_faults(
        self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: np.ndarray
    ) -> dict[int, str]:
        """Texts that cannot be a document: where EOS would not be its end, or bytes do not fit."""
        faults = {}
        num_eos = np.add.reduceat(tokens == self.state.eos_id, np.cumsum(lengths) - lengths)
        limit = np.iinfo(self.state.bytes_dtype).max
        for i in np.flatnonzero((num_eos > 1) | (num_bytes > limit * (lengths - 1))):
            count = lengths[i] - 1
            faults[int(i)] = f"{num_bytes[i]} bytes of text make only {count} tokens"
            if num_eos[i] > 1:
                faults[int(i)] = "the tokenizer finds its end-of-text token in the text"
        return faults

    def count_bytes(
        self,
        texts: list[str],
        num_bytes: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
        faults: dict[int, str],
        places: list[int] | None,
    ) -> np.ndarray:  # (n,)
        """Bytes of each token, by table; by offsets for texts where the table's sum is wrong.

        Adds to `faults` where such a text was not read whole.
        """
        ends = np.cumsum(lengths)
        starts = ends - lengths
        sizes = self.state.bytes_table[tokens]
        excess = np.add.reduceat(sizes, starts) - num_bytes
        # Llama and RoBERTa put a space in front of a text; it is in no byte of it.
        prefixed = (excess == 1) & self.state.starts_with_space[tokens[starts]]
        sizes[starts[prefixed]] -= 1
        right = (excess == 0) | prefixed
        right &= self.state.table_is_exact
        right |= lengths == 1  # EOS alone: a special token's part has no text
        limit = np.iinfo(self.state.bytes_dtype).max
        for i in np.flatnonzero(~right):
            if i in faults:
                continue
            span = slice(starts[i], ends[i] - 1)
            backend = self.backend if places is None else self.backends[places[i]]
            lost = self.count_lost(backend, texts[i], tokens[span])
            if lost > 0:
                faults[int(i)] = (
                    f"{lost} of its {num_bytes[i]} bytes are in no token: as this release of "
                    "transformers reads the tokenizer, it loses text"
                )
                continue
            sizes[span] = fit(bytes_by_offsets(backend, texts[i], tokens[span]), limit)
        return sizes

    def count_lost(self, backend: Tokenizer, text: str, tokens: np.ndarray) -> int:
        """Bytes of the normalized text that no token has; a vocabulary of all bytes loses none."""
        if not self.state.table_is_exact or self.state.is_added[tokens].any():
            return 0
        normalizer: Any = backend.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        if not self.state.byte_level:
            normal = normal.replace("\u2581", " ")
        return len(normal.encode()) - int(self.state.bytes_table[tokens].sum())
