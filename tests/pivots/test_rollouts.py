"""Completions on disk: what was added is there again, whole lines alone."""

import json

import pytest

from slm.errors import UserError
from slm.pivots.rollouts import Rollouts, Sample, Tally
from slm.pivots.search import Node

A, B = Node("q", ()), Node("q", (7, 8))
FIRST = [Sample([4, 1], True), Sample([4, 2, 1], False), Sample([5], True)]
OTHER = [Sample([9, 1], False, [-0.5, -0.25])]


def test_what_was_added_is_there_again(tmp_path):
    store = Rollouts(tmp_path, [1])
    store.add("search", [(A, FIRST), (B, OTHER)])
    store.add("confirm", [(A, [Sample([4, 1], True)])])
    for one in (store, Rollouts(tmp_path, [1])):
        assert one.places["search", A].tally == Tally(2, 3)
        assert one.places["search", A].firsts == {4: Tally(1, 2), 5: Tally(1, 1)}
        assert one.firsts(A, ("search", "confirm")) == {4: Tally(2, 3), 5: Tally(1, 1)}
        assert one.samples("search", A) == FIRST and one.samples("search", B) == OTHER
        assert (one.num_samples, one.num_tokens, one.num_ended) == (5, 10, 4)
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "phase": "search",
        "question": "q",
        "prefix": [7, 8],
        "samples": [[9, 1]],
        "right": [0],
        "logprobs": [[-0.5, -0.25]],
    }


def test_a_line_that_was_cut_off_is_gone_and_others_follow_what_is_whole(tmp_path):
    Rollouts(tmp_path, [1]).add("search", [(A, FIRST), (B, OTHER)])
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    store = Rollouts(tmp_path, [1])
    assert list(store.places) == [("search", A)]
    store.add("search", [(B, OTHER)])
    again = Rollouts(tmp_path, [1])
    assert again.samples("search", B) == OTHER and again.samples("search", A) == FIRST


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"phase": "search"', "rollouts.jsonl line 2 is damaged: "),
        (
            '{"phase": "search"}',
            "rollouts.jsonl line 2 is no line of rollouts: it must have phase,",
        ),
        (
            '{"phase":"a","question":"q","prefix":[],"samples":[[1],[2]],"right":[1]}',
            "rollouts.jsonl line 2 has 2 samples, 1 right",
        ),
    ],
)
def test_damage_is_refused_by_line(tmp_path, line, message):
    Rollouts(tmp_path, [1]).add("search", [(A, FIRST)])
    with open(tmp_path / "rollouts.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        Rollouts(tmp_path, [1])
