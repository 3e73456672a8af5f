"""What a piece of a window reads; `slm score context=` is tested in test_command.py."""

import torch

from slm.score.pieces import Piece, piece_of


def test_in_a_piece_the_document_that_began_before_it_begins_anew():
    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "targets": ids + 1, "window": torch.tensor([3])}
    batch["position_ids"] = torch.tensor([[4, 5, 6, 7, 0, 1, 2, 0]])
    found = {name: values.tolist() for name, values in piece_of(batch, Piece(0, 2, 5, 3)).items()}
    assert found == {
        "input_ids": [[2, 3, 4, 5, 6]],
        "targets": [[-100, -100, -100, 6, 7]],  # the first three are of the piece before
        "position_ids": [[0, 1, 0, 1, 2]],
    }
    assert batch["targets"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
