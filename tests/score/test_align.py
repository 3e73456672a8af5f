"""Shares by bytes: by hand, and the sums for any two ways to cut a text."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.score.align import shared_logprobs


def shares(ours: list[int], theirs: list[int], logprobs: list[float]) -> list[float]:
    found = shared_logprobs(np.array(ours), np.array(theirs), np.array(logprobs))
    return found.tolist()


def test_blocks_by_hand():
    # ours  |ab|cde|f|   theirs |a|b|cd|ef|: blocks ab (two of theirs) and cdef (two of each)
    assert shares([2, 3, 1], [1, 1, 2, 2], [-1, -2, -4, -8]) == [-3, -9, -3]
    assert shares([1, 2, 1], [1, 2, 1], [-1.5, -2.5, -0.5]) == [-1.5, -2.5, -0.5]


def test_tokens_of_no_bytes():
    # A space that the reference's tokenizer puts in front is part of the first block.
    assert shares([2, 2], [0, 2, 2], [-1, -2, -3]) == [-3, -3]
    assert shares([0, 4], [2, 2], [-1, -2]) == [0, -3]
    assert shares([3, 0, 1], [3, 1], [-6, -1]) == [-6, 0, -1]


def test_a_text_that_was_cut_has_its_share_of_the_last_block():
    assert shares([2, 1], [2, 4, 3], [-1, -8, -5]) == [-1, -2]
    assert shares([2, 1], [3, 4], [-3, -8]) == [-2, -1]
    assert shares([2, 3], [2, 1], [-1, -2]) == [-1, -2]  # what the reference has not read: none
    assert shares([1], [4], [-8]) == [-2] and shares([], [2], [-1]) == []


sizes = st.lists(st.integers(0, 5), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(ours=sizes, theirs=sizes, data=st.data())
def test_sums_agree_and_no_token_crosses_a_shared_boundary(ours, theirs, data):
    gap = sum(ours) - sum(theirs)
    theirs, ours = [*theirs, max(0, gap)], [*ours, max(0, -gap)]
    scores = data.draw(st.lists(st.floats(-30, 0), min_size=len(theirs), max_size=len(theirs)))
    found = shared_logprobs(np.array(ours), np.array(theirs), np.array(scores))
    if not sum(ours):
        return
    np.testing.assert_allclose(found.sum(), sum(scores), rtol=1e-12, atol=1e-12)
    our_ends, their_ends = np.cumsum(ours), np.cumsum(theirs)
    for end in {*our_ends.tolist()} & {*their_ends.tolist()} - {0}:
        mine, other = found[our_ends <= end].sum(), np.array(scores)[their_ends <= end].sum()
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-12)
