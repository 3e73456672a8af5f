"""Labels against a bytewise definition; spans however they are written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.prepare.documents import Text
from slm.prepare.labels import (
    NOISE,
    SIGNAL,
    UNKNOWN,
    byte_edges,
    label_text,
    label_tokens,
    masked_text,
    merge,
    untrained_tokens,
)

TEXTS = st.text(st.sampled_from("ab \n\u00e9\u0301\u4e2d\U0001f600"), min_size=1, max_size=30)


def byte_labels(text: str, spans) -> list[bool]:
    """Of every byte, the label of its character."""
    signal = {i for start, end in spans for i in range(start, end)}
    return [i in signal for i, char in enumerate(text) for _ in char.encode()]


@st.composite
def labelled(draw):
    """A text, spans that overlap in any order, and tokens of any sizes that sum to its bytes."""
    text = draw(TEXTS)
    place = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(place, place).map(sorted).map(tuple), max_size=5))
    total = len(text.encode())
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=12)))
    return text, spans, np.diff([0, *cuts, total])


def expected_labels(text: str, spans, sizes) -> list[int]:
    found, at = [], 0
    for size in sizes:
        mine = byte_labels(text, spans)[at : at + size]
        signal, noise = mine.count(True), mine.count(False)
        found.append(SIGNAL if signal > noise else NOISE if noise > signal else UNKNOWN)
        at += size
    return found


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(labelled())
def test_a_token_has_the_label_of_most_of_its_bytes(given_text):
    text, spans, sizes = given_text
    for dtype in (np.uint8, np.int64):
        found = label_text(text, spans, sizes.astype(dtype))
        assert found.dtype == np.int8
        assert found.tolist() == expected_labels(text, spans, sizes)


@settings(max_examples=200, deadline=None)
@given(labelled())
def test_merged_spans_are_the_same_characters(given_text):
    text, spans, _ = given_text
    merged = merge(spans)
    assert byte_labels(text, merged) == byte_labels(text, spans)
    borders = [place for span in merged for place in span]
    assert borders == sorted(set(borders))


def test_edges_are_counted_in_bytes():
    text = "a\u00e9\u4e2d\U0001f600z"  # 1, 2, 3, 4 and 1 bytes
    assert byte_edges(text, [(4, 5), (1, 2), (2, 3)]).tolist() == [1, 6, 10, 11]
    assert byte_edges(text, []).tolist() == byte_edges(text, [(2, 2)]).tolist() == []


@pytest.mark.parametrize(("size", "label"), [(3, SIGNAL), (4, UNKNOWN), (5, NOISE)])
def test_half_and_half_has_no_majority(size, label):
    assert label_text("abcdef", [(0, 2)], np.array([size]))[0] == label


def test_texts_without_spans_are_unknown():
    sizes = np.array([1, 1, 0, 2, 0, 2, 0], np.uint8)
    texts = [
        Text("", 0, "ab", b"ab", None, spans=((1, 2),)),
        Text("", 1, "cd", b"cd", None),
        Text("", 2, "ef", b"ef", None, spans=()),
    ]
    found, counts = label_tokens(texts, sizes, np.array([3, 2, 2]))
    assert counts.tolist() == [[1, 0, 0], [1, 0, 1]]
    assert found.tolist() == [NOISE, SIGNAL, UNKNOWN, UNKNOWN, UNKNOWN, NOISE, UNKNOWN]


def expected_masks(text: str, spans, sizes) -> list[bool]:
    """Half of its bytes or more; without bytes as the token before, and the first is none."""
    found, at = [], 0
    for size in sizes:
        mine = byte_labels(text, spans)[at : at + size]
        before = found[-1] if found else False
        found.append(before if size == 0 else mine.count(True) >= mine.count(False))
        at += size
    return found


@settings(max_examples=100, deadline=None)
@given(labelled())
def test_a_mask_takes_what_stands_half_in_it(given_text):
    text, spans, sizes = given_text
    found = masked_text(text, spans, sizes.astype(np.uint8))
    assert found.tolist() == expected_masks(text, spans, sizes)


def test_documents_that_are_masked_in_part_or_have_no_weight():
    sizes = np.array([1, 1, 0, 2, 0, 2, 0, 1, 0], np.uint8)
    texts = [
        Text("", 0, "ab", b"ab", None, masked=((1, 2),)),  # its EOS goes with b
        Text("", 1, "cd", b"cd", None, weight=3.0),
        Text("", 2, "ef", b"ef", None, weight=1e-60),  # 0 as a float32
        Text("", 3, "g", b"g", None, weight=0, masked=((0, 0),)),
    ]
    found = untrained_tokens(texts, sizes, np.array([3, 2, 2, 2]))
    assert found.tolist() == [False, True, True, False, False, True, True, True, True]
