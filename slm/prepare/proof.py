"""Does gigatoken give the ids of `tokenizers`? It is asked before it encodes in its place.

It is compared on texts of the corpus, on generated ones (spaces, line ends, controls, combining
marks, emoji, the strings of added tokens) and on every script, code point by code point: its
tables are of another release of Unicode, so a text with a character that is not proven goes to
`tokenizers`. It knows no offsets: texts whose bytes are counted by those are encoded by both.
"""

from __future__ import annotations

import json
import logging
import random
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib import metadata
from itertools import islice, product
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from slm.errors import UserError
from slm.prepare.encoder import Encoder, EncoderState, encode_batch, make_backend, make_fast
from slm.prepare.readers import read_source
from slm.prepare.records import read_texts
from slm.prepare.sources import Source
from slm.store.files import Json
from slm.store.tokenizer import PROBE, byte_characters, first_line, is_panic

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("slm.prepare")
Made = TypeVar("Made")

WORTH_BYTES = 2**24  # of input: below, a proof takes as long as it saves
SAMPLED_FILES, SAMPLED_TEXTS, SAMPLED_CHARACTERS = 16, 16, 2**12  # of a source, a file, a text
NUM_GENERATED = 2000
TRICKY = [
    *"aZ9 .,'\"_/\\#=-\t\n\r\0\x01\x7f\x85\xa0\xad\xe9\u00df\u0130\u0301\u0323\u200b\u200d\u2028",
    *"\u3000\ufeff\u6771\u3053\ud55c\u0e01\u0e31\u05d0\u0627\u0915\u094d\u0665\uff11\ufb01\u2168",
    *("\u00b2", "\ufffd", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u2019t", "'\u017f", "'LL"),
    *("  ", "    ", " \n", "\r\n", "\n\n", "\t\t", " the", "word", "123", "1234567", "don't"),
    *("'s", "http://a.b/c?d=e", "foo_bar(", "...", "==", "//"),
]
RUNS = [sign * 300 for sign in (" ", "\n", "\t", "\r\n", "a", "=", "7", "\u0301", "\u6771", "a ")]
# Unicode 17 has no characters elsewhere, but for private ones, which stand in no text.
PLANES = ((0, 0x33480), (0xE0000, 0xE0200))
# Characters of one kind, of which some are looked at: ideographs, Hangul, private use.
UNIFORM = ((0x3400, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0x17000, 0x18CFF))
UNIFORM += ((0x20000, 0x2FFFF), (0x30000, 0x3FFFF))
EVERY, TOGETHER = 64, 16  # of these so many are passed over; characters of one text


class Unproven(Exception):
    """Why gigatoken cannot be used."""


# ---- what is compared ---------------------------------------------------------------------------


def sample_texts(sources: list[Source], max_bytes: int) -> Iterator[str]:
    """The first texts of some files of every source, which lie evenly among its files."""
    for source in sources:
        step = max(1, len(source.files) // SAMPLED_FILES)
        parts = [replace(source, files=(file,)) for file in source.files[::step]]
        for part in parts or [source]:
            blocks = read_source(part, max_bytes)
            texts = (text for block in blocks for text in read_texts(block, part, max_bytes))
            for text in islice(texts, SAMPLED_TEXTS):
                yield text.text[:SAMPLED_CHARACTERS]


def generated_texts(state: Json) -> Iterator[str]:
    added = [token["content"] for token in state["added_tokens"]]
    pieces = [*TRICKY, *added, *(content[:-1] for content in added), *added]
    rng = random.Random(0)
    yield from (PROBE, *RUNS, *added)
    for _ in range(NUM_GENERATED):
        yield "".join(rng.choices(pieces, k=rng.randint(1, 24)))


@cache
def assigned() -> np.ndarray:  # (0x110000,) bool
    """Code points that the Unicode of this Python knows, and that stand in texts."""
    known = np.zeros(0x110000, bool)
    for first, last in PLANES:
        kinds = [unicodedata.category(chr(point)) for point in range(first, last)]
        known[first:last] = [kind not in ("Cn", "Cs") for kind in kinds]
    return known


def probes() -> Iterator[np.ndarray]:
    """Groups of code points."""
    points = np.flatnonzero(assigned())
    uniform = np.zeros(len(points), bool)
    for first, last in UNIFORM:
        uniform |= (points >= first) & (points <= last)
    points = points[(points >= 0x80) & (~uniform | (points % EVERY == 0))]
    yield from np.split(points, range(TOGETHER, len(points), TOGETHER))


def in_context(point: int) -> str:
    """Whether a pattern cuts before and behind it shows its kind."""
    sign = chr(point)
    return f"a{sign}1{sign}.{sign} {sign}A"


def edges_alone(state: Json) -> Json:
    """A byte-level tokenizer with a token for every two bytes that meet in a context.

    The vocabulary at hand joins few of them, and would hide where the text was cut.
    """
    alphabet = byte_characters()
    around = [alphabet[byte] for byte in b"a1. A"]
    leads, last = ([alphabet[b] for b in range(*r)] for r in ((0xC2, 0xF5), (0x80, 0xC0)))
    merges = [*product(around, leads), *product(last, around), *product(last, leads)]
    vocab = [*alphabet, *("".join(pair) for pair in merges)]
    model = {
        "vocab": {token: i for i, token in enumerate(vocab)},
        "merges": list(map(list, merges)),
    }
    changed = {"unk_token": None, "ignore_merges": False}
    return state | {"model": state["model"] | model | changed, "added_tokens": []}


# ---- the proof ----------------------------------------------------------------------------------


def prove(state: EncoderState, samples: Iterable[str]) -> EncoderState:
    """The state with what gigatoken is proven for; raises Unproven."""
    if encoder_version("gigatoken") is None:
        raise Unproven("it is not installed (pip install 'slm-trainer[gigatoken]')")
    found = [*samples, *generated_texts(json.loads(state.backend))]
    encoder, proven = Encoder(state), assigned()
    engines = engines_of(encoder)
    for one, (backend, fast) in engines.items():
        if state.byte_level:
            edges = json.dumps(edges_alone(json.loads(one)))
            backend, fast = make_backend(edges), readable(make_fast, edges)
        proven = proven & proven_points(backend, fast)
    encoder.state = state = replace(state, proven=np.packbits(proven))
    texts = [text for text in found if encoder.is_proven(text)]
    for backend, fast in engines.values():
        for text, theirs, ours in compare(backend, fast, texts):
            raise Unproven(
                f"its ids of {reprlib.repr(text)} are {reprlib.repr(ours)}, those of tokenizers "
                f"{reprlib.repr(list(theirs))}"
            )
    return state


def engines_of(encoder: Encoder) -> dict[str, tuple[Tokenizer, Any]]:
    """By spelling: of `tokenizers`, of gigatoken."""
    pairs = zip(encoder.backends, readable(lambda: encoder.fast), strict=True)
    return dict(zip(encoder.spellings, pairs, strict=True))


def readable(call: Callable[..., Made], *given: Any) -> Made:
    """What gigatoken makes of a tokenizer or a text, or Unproven."""
    try:
        return call(*given)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise Unproven(f"it cannot read the tokenizer: {first_line(error)}") from None


def compare(
    backend: Tokenizer, fast: Any, texts: list[str]
) -> Iterator[tuple[str, Any, list[int]]]:
    """(text, ids of tokenizers or why there are none, of gigatoken) where they differ."""
    ours = readable(lambda: [fast.encode(text).tolist() for text in texts])
    for text, found, mine in zip(texts, encode_batch(backend, texts), ours, strict=True):
        theirs = found if isinstance(found, str) else list(found)
        if theirs != mine:
            yield text, theirs, mine


def proven_points(backend: Tokenizer, fast: Any) -> np.ndarray:  # (0x110000,) bool
    """Of a group in which one differs, none is proven."""
    known = assigned().copy()
    by_text = {"".join(map(in_context, group.tolist())): group for group in probes()}
    for text, _, _ in compare(backend, fast, list(by_text)):
        known[by_text[text]] = False
    return known


def choose_encoder(
    asked: str, state: EncoderState, sources: list[Source], max_bytes: int, num_bytes: int | None
) -> EncoderState:
    """The state with the encoder that is asked for: "auto", "tokenizers" or "gigatoken".

    num_bytes: of the input, None where that is not known
    """
    if asked == "gigatoken" or (asked == "auto" and (num_bytes or WORTH_BYTES) >= WORTH_BYTES):
        try:
            state = prove(state, sample_texts(sources, max_bytes))
        except Unproven as why:
            if asked == "gigatoken":
                raise UserError(f"tokenizer.encoder is gigatoken, and {why}") from None
            log.info("gigatoken would be faster, but %s", why)
    log.info("encoding with %s", encoder_name(state))
    return state


def encoder_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def encoder_name(state: EncoderState) -> str:
    """For the report: which library encodes, and its version."""
    name = "tokenizers" if state.proven is None else "gigatoken"
    return f"{name} {encoder_version(name)}"
