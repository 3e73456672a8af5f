"""One token against another, where the completions that begin with them say so."""

import pytest

from slm.pivots.pairs import Pair, pair_of, pairs_of
from slm.pivots.rollouts import Tally
from slm.pivots.search import Candidate, Node, Pivot

HERE = Node("q", (7,))


def pivot(token: int, before: int, after: int) -> Pivot:
    return Pivot(Candidate(HERE, Node("q", (7, token)), None), before, after)


def test_the_surest_of_the_other_tokens_is_taken():
    firsts = {3: Tally(40, 45), 4: Tally(2, 5), 5: Tally(4, 30), 6: Tally(0, 4), 8: Tally(19, 20)}
    up = pair_of(pivot(3, 35, 58), 64, firsts, 5, 0.05)
    assert up == Pair(HERE, 3, 5, 58 / 64, 4 / 30)  # 4 is surer still, but rare; 6 is rarer
    down = pair_of(pivot(5, 35, 9), 64, firsts, 5, 0.05)
    assert down == Pair(HERE, 3, 5, 40 / 45, 9 / 64)


def test_a_difference_that_chance_makes_is_none():
    firsts = {3: Tally(20, 20), 4: Tally(3, 5)}
    one = pivot(3, 30, 50)  # 50 of 64 against 3 of 5: p = 0.32 by Fisher's test
    assert pair_of(one, 64, firsts, 5, 0.05) is None
    assert pair_of(one, 64, firsts, 5, 0.5) == Pair(HERE, 3, 4, 50 / 64, 0.6)
    assert pair_of(one, 64, {3: Tally(20, 20)}, 1, 0.05) is None  # nothing else was said


def test_each_pair_of_tokens_at_a_place_is_one():
    firsts = {HERE: {3: Tally(40, 45), 5: Tally(4, 40)}}
    both = [pivot(3, 35, 58), pivot(5, 35, 9), pivot(3, 35, 58)]
    (found,) = pairs_of(both, 64, firsts, 5, 0.05)
    assert (found.chosen, found.rejected) == (3, 5)
    assert found.chosen_success == pytest.approx(58 / 64)
