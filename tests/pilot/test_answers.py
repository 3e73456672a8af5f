"""What a pilot says of runs that are not all of one kind; whole ones are in test_command.py."""

import numpy as np
import pytest

from slm.pilot.answers import clocks, reference_itself
from slm.pilot.losses import Measured
from slm.pilot.statistics import Resampled
from slm.pilot.verdict import REFERENCE, Rules, excess
from slm.selection.names import ALL_TOKENS


def test_a_seed_that_an_open_question_added_has_no_clock_of_all_tokens():
    records = {
        (ALL_TOKENS, 0): {"train_seconds": 4.0},
        (ALL_TOKENS, 1): {"train_seconds": None},
        (excess(0.4), 0): {"train_seconds": 3.0},
        (excess(0.4), 1): {"train_seconds": 3.0},
        (excess(0.4), 2): {"train_seconds": 9.0},
        (excess(0.6), 3): {"train_seconds": 9.0},
    }
    assert clocks(records, 0.4) == [0.75, None]
    assert clocks(records, 0.6) == []


@pytest.mark.parametrize(("apart", "words"), [(-0.5, ["0.500 nats"]), (0.0, []), (0.5, [])])
def test_a_reference_that_is_better_than_the_arm_is_told_beside_the_verdict(apart, words):
    targets = np.array([10, 20, 30])
    losses = {excess(0.5): 3.0, REFERENCE: 3.0 + apart}
    nats = {
        arm: {seed: np.stack([targets * loss]) for seed in range(3)} for arm, loss in losses.items()
    }
    one = Resampled(Measured("held", targets, np.array([100]), nats), draws=50)
    told = [*reference_itself(one, excess(0.5), Rules([0.5], 3, 3, 0.05, 0.01, False))]
    assert [any(word in text for word in words) for text in told] == [True] * len(words)
