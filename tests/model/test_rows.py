"""Which rows are gathered, where they stand among the queries, and what padding is."""

import torch

from slm.model.rows import make_rows


def test_rows_are_ascending_and_padded():
    selected = torch.tensor([[0, 1, 1], [1, 0, 0]]).bool()
    exact, padded = make_rows(selected, None), make_rows(selected, 5)
    assert exact.index.tolist() == [1, 2, 3] and padded.index.tolist() == [1, 2, 3, 6, 6]
    assert exact.queries.tolist() == [[0, 1], [2, 0]] and exact.slots.tolist() == [0, 1, 2]
    assert exact.positions[0].tolist() == [1, 2] and exact.positions[1, 0] == 0
