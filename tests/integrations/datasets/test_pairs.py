"""Pairs keep their tokens; their scores are log-softmax of all logits; what is wrong has a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from door_helpers import make_model
from slm.errors import UserError
from slm.integrations.datasets import pairs_dataset, score_pairs

PAIRS: list[dict[str, Any]] = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9]},
    {"prompt_ids": [4], "chosen_ids": [10, 11, 12], "rejected_ids": [13, 14]},
    {"prompt_ids": [9, 2], "chosen_ids": [3, 3], "rejected_ids": [3, 5, 1, 2]},
]
OF_PIVOTS = {"question": "a", "chosen_success": 0.9, "prompt": "x", "chosen": "y", "rejected": "z"}


def written(folder: Path, records: list[Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n\n" for one in records))
    return path


def test_pairs_are_their_token_ids_alone(tmp_path):
    pairs = pairs_dataset(written(tmp_path, [OF_PIVOTS | pair for pair in PAIRS]))
    assert pairs.to_list() == PAIRS


def test_scores_are_those_of_each_response_behind_its_prompt(tmp_path):
    model = make_model()
    scored = score_pairs(pairs_dataset(written(tmp_path, PAIRS)), model, batch_size=2)
    for pair, row in zip(PAIRS, scored.to_list(), strict=True):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            exact = model(ids).logits[0, :-1].log_softmax(-1)
            own = exact.gather(1, ids[0, 1:, None])[:, 0][-len(pair[f"{side}_ids"]) :]
            found = torch.tensor(row[f"{side}_reference_logprob"])
            torch.testing.assert_close(found, own.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt_ids": []}, r"pairs.jsonl:3: prompt_ids is \[\], it must be a list of at least"),
        ({"chosen_ids": [7.0]}, r"chosen_ids is \[7.0\]"),
        ({"chosen_ids": [True]}, r"chosen_ids is \[True\]"),
        ({"rejected_ids": [-1]}, r"rejected_ids is \[-1\]"),
        ({"rejected_ids": "9"}, "rejected_ids is '9'"),
        ({"rejected_ids": [8]}, r"chosen_ids and rejected_ids are both \[8\]"),
    ],
)
def test_a_pair_that_is_none_is_refused_with_its_line(tmp_path, change, match):
    with pytest.raises(UserError, match=match):
        pairs_dataset(written(tmp_path, [PAIRS[1], PAIRS[0] | change]))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "has no pairs"),
        ("{", "pairs.jsonl:1: Expecting"),
        ("[1]", "pairs.jsonl:1: list indices"),
        ('{"prompt_ids": [1]}', "pairs.jsonl:1: field 'chosen_ids' is missing"),
    ],
)
def test_a_file_that_holds_no_pairs_is_refused(tmp_path, text, match):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        pairs_dataset(path)
