"""Documents of parts: which tokens are targets, and where a chat template's special tokens stand.

A document of text is all targets, but for what is masked or has no weight. A prompt with its answer
and a chat are parts that are encoded apart, so that no token straddles a border: while the model
answers, the prompt is tokenized alone too. d documents of p parts have n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from slm.prepare.documents import Part, Text
from slm.prepare.encoder import AFTER_SPECIAL, AFTER_TEXT, AT_START, Encoder
from slm.prepare.labels import untrained_tokens
from slm.store.files import Json
from slm.store.shards import Corpus

WINDOWS_AT_ONCE = 4096


class Documents(NamedTuple):
    """Encoded documents, EOS included."""

    tokens: np.ndarray  # (n,)
    sizes: np.ndarray  # (n,): bytes of each token
    masks: np.ndarray  # (n,) bool: is the token a target?
    lengths: np.ndarray  # (d,): tokens
    num_targets: np.ndarray  # (d,)
    num_bytes: np.ndarray  # (d,): UTF-8 bytes, special tokens have none
    faults: dict[int, str]  # document -> why its tokens must not be used


def encode_documents(encoder: Encoder, texts: list[Text]) -> Documents:
    found = encode_texts(encoder, texts)
    if not any(text.masked or text.weight != 1 for text in texts):
        return found
    masks = found.masks & ~untrained_tokens(texts, found.sizes, found.lengths)
    starts = np.cumsum(found.lengths) - found.lengths
    return found._replace(masks=masks, num_targets=np.add.reduceat(masks, starts, dtype=np.int64))


def encode_texts(encoder: Encoder, texts: list[Text]) -> Documents:
    """Of their parts."""
    if any(text.parts for text in texts):
        plain = [text.parts or (Part(text.text, True),) for text in texts]
        return encode_parts(encoder, plain)
    num_bytes = np.array([len(text.data) for text in texts], dtype=np.int64)
    encoded = encoder.encode([text.text for text in texts], num_bytes)
    masks = np.ones(len(encoded.tokens), dtype=bool)
    tokens, sizes, lengths, faults = encoded
    return Documents(tokens, sizes, masks, lengths, lengths, num_bytes, faults)


def encode_parts(encoder: Encoder, documents: Sequence[Sequence[Part]]) -> Documents:
    parts = list(chain.from_iterable(documents))
    num_parts = np.array([len(document) for document in documents])
    first = np.cumsum(num_parts) - num_parts  # (d,)
    num_bytes = np.array([len(part.text.encode()) for part in parts], dtype=np.int64)
    encoded = encoder.encode(
        [part.text for part in parts], num_bytes, list(chain.from_iterable(map(places, documents)))
    )
    live = np.array([part.is_target for part in parts])
    # The encoder ends every part with EOS: that of the last one stays, that of a special token's
    # (empty) part becomes the special token, the others go.
    special = np.array([-1 if part.special is None else part.special for part in parts])
    ends = np.cumsum(encoded.lengths) - 1
    encoded.tokens[ends[special >= 0]] = special[special >= 0]
    goes = special < 0
    goes[first + num_parts - 1] = False
    kept = np.ones(len(encoded.tokens), dtype=bool)
    kept[ends[goes]] = False
    lengths = encoded.lengths - goes  # (p,)
    return Documents(
        encoded.tokens[kept],
        encoded.sizes[kept],
        np.repeat(live, lengths),
        np.add.reduceat(lengths, first),
        np.add.reduceat(lengths * live, first),
        np.add.reduceat(num_bytes, first),
        faulty_documents(encoded.faults, first, lengths, live),
    )


def places(document: Sequence[Part]) -> list[int]:
    """What stands before each part."""
    after = [AFTER_TEXT if part.special is None else AFTER_SPECIAL for part in document]
    return [AT_START, *after[:-1]]


def faulty_documents(
    faults: dict[int, str],
    first: np.ndarray,  # (d,)
    lengths: np.ndarray,  # (p,)
    live: np.ndarray,  # (p,)
) -> dict[int, str]:
    """A line end between two turns may make no token, where a tokenizer drops white space."""
    found: dict[int, str] = {}
    for part, fault in faults.items():
        if lengths[part] > 0 or live[part]:
            found.setdefault(int(np.searchsorted(first, part, side="right")) - 1, fault)
    return found


# ---- what the windows make of it ----------------------------------------------------------------


def window_targets(corpus: Corpus) -> Json:
    """Targets of all windows, and those whose document began before their window.

    The latter are learned without their prompt, or without a part of it.
    """
    found = np.zeros(2, np.int64)
    for index, count in enumerate(corpus.windows_per_shard):
        masks, starts = corpus.column("masks", index), corpus.column("documents", index)[:, 0]
        for first in range(0, count, WINDOWS_AT_ONCE):
            begins = np.arange(first, min(first + WINDOWS_AT_ONCE, count)) * corpus.seq_len
            found += count_targets(masks, starts, begins, corpus.seq_len)
    return {"targets_in_windows": int(found[0]), "targets_without_prompt": int(found[1])}


def count_targets(
    masks: np.ndarray,  # (n,) bool
    starts: np.ndarray,  # (d,) of the documents, ascending
    begins: np.ndarray,  # (W,) of the windows, one after another
    seq_len: int,
) -> np.ndarray:  # (2,)
    offset, ends = begins[0], begins + seq_len + 1
    before = np.concatenate([[0], np.cumsum(masks[offset : ends[-1]], dtype=np.int64)])
    document = np.searchsorted(starts, begins, side="right") - 1
    following = np.append(starts, np.iinfo(np.int64).max)[document + 1]
    open_ends = np.where(starts[document] < begins, np.minimum(following, ends), begins + 1)
    targets = before[ends - offset] - before[begins + 1 - offset]
    cut_off = before[open_ends - offset] - before[begins + 1 - offset]
    return np.array([targets.sum(), cut_off.sum()])
