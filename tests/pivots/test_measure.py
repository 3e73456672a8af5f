"""Places are measured once, by completions that are judged as a whole."""

import pytest

from slm.evaluate.problems import Problem
from slm.pivots.measure import Measured, Unanswered
from slm.pivots.questions import Question
from slm.pivots.rollouts import Rollouts
from slm.pivots.sampling import Draw
from slm.pivots.search import Node

EOS = 0
ROOT, INSIDE = Node("k", ()), Node("k", (5,))


class Words:
    """A tokenizer: each id is a word."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class Prepared:
    """A sampler that says what it was told to, batches of two."""

    stops = [EOS]

    def __init__(self, said: dict[Node, list[list[int]]]):
        self.said, self.calls = said, []

    def batches(self, nodes, samples):
        return [nodes[first : first + 2] for first in range(0, len(nodes), 2)]

    def sample(self, batch, samples, phase):
        self.calls.append((phase, tuple(batch)))
        return [[Draw(ids) for ids in self.said[node]] for node in batch]

    def logprobs(self, question, ids):
        return [-1.0 * one for one in ids]


def measured(folder, said) -> tuple[Measured, Prepared, list[str]]:
    sampler, seen = Prepared(said), []

    def judge(question, text):
        seen.append(text)
        return text.endswith("1")

    question = Question("k", "1", {}, Problem("?", "", ""), [9])
    store = Rollouts(folder, [EOS])
    made = Measured(store, sampler, judge, {"k": question}, Words(), {"search": 4, "confirm": 2})  # type: ignore[arg-type]
    return made, sampler, seen


SAID = {
    ROOT: [[2, EOS], [3, 1, EOS], [2, EOS], [4, 1, EOS], [1, 1, 1], [7, EOS]],
    INSIDE: [[1, EOS], [2, EOS], [1]],
}


def test_a_place_is_sampled_once_in_a_phase(tmp_path):
    one, sampler, seen = measured(tmp_path, SAID)
    assert one.right("search", [ROOT, INSIDE]) == {ROOT: 2, INSIDE: 1}
    # the prefix belongs to the completion, the EOS does not; what did not end is not judged
    assert seen == ["2", "3 1", "2", "4 1", "7", "5 1", "5 2"]
    assert one.right("search", [INSIDE]) == {INSIDE: 1}
    assert one.right("confirm", [INSIDE]) == {INSIDE: 1}
    assert sampler.calls == [("search", (ROOT, INSIDE)), ("confirm", (INSIDE,))]
    again, sampler, _ = measured(tmp_path, {})
    assert again.right("search", [ROOT, INSIDE]) == {ROOT: 2, INSIDE: 1} and not sampler.calls


def test_solutions_are_different_and_right_and_wrong_in_turn(tmp_path):
    one, _, _ = measured(tmp_path, SAID)
    one.right("search", [ROOT])
    found = one.solutions("k", 3)
    assert [s.ids for s in found] == [(3, 1, EOS), (2, EOS), (4, 1, EOS)]
    assert [s.right for s in found] == [True, False, True]
    assert found[0].logprobs == [-3, -1, 0]
    assert [s.ids for s in one.solutions("k", 9)][3:] == [(7, EOS)]  # [1, 1, 1] did not end


def test_what_nobody_sampled_is_named(tmp_path):
    one, _, _ = measured(tmp_path, {ROOT: SAID[ROOT], INSIDE: []})
    with pytest.raises(Unanswered) as stopped:
        one.right("search", [ROOT, INSIDE])
    assert (stopped.value.phase, stopped.value.nodes) == ("search", [INSIDE])
    assert ("search", ROOT) in one.store.places  # and what was sampled is kept
