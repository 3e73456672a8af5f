"""What a pilot says of runs that are not all of one kind; whole ones are in test_command.py."""

from slm.pilot.answers import clocks
from slm.pilot.verdict import excess
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
