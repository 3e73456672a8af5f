"""Scores go where a collator of Hugging Face puts their tokens."""

from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    default_data_collator,
)

from door_helpers import Row, dataset_of, make_tokenizer, padding
from slm.integrations.collator import ReferenceCollator
from slm.integrations.loss import BESIDE


def tagged(lengths: list[int]) -> list[Row]:
    """Scores that say which token they belong to: minus its id."""
    ids = iter(range(2, 61))
    rows = []
    for length in lengths:
        row = [next(ids) for _ in range(length)]
        scores = [float("nan"), *(-float(i) for i in row[1:])]
        rows.append({"input_ids": row, "labels": list(row), "reference_logprob": scores})
        rows[-1]["token_weight"] = [i / 2 for i in row]
    return rows


@pytest.mark.parametrize(
    "collator",
    [
        padding("right"),
        padding("left"),
        padding("left", pad_to_multiple_of=8),
        DataCollatorWithFlattening(),
        DataCollatorForLanguageModeling(make_tokenizer("left"), mlm=False),
    ],
    ids=["right", "left", "multiple", "flattening", "language modeling"],
)
def test_scores_go_where_their_tokens_go(collator):
    rows = tagged([3, 7, 1, 5])
    if isinstance(collator, DataCollatorForLanguageModeling):
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    plain = collator([{k: v for k, v in row.items() if k not in BESIDE} for row in rows])
    batch = ReferenceCollator(collator)(rows)
    assert {key for key in batch if key not in BESIDE} == set(plain)
    assert all(
        torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(plain[key])) for key in plain
    )
    firsts = torch.isin(batch["input_ids"], torch.tensor([row["input_ids"][0] for row in rows]))
    tokens = (batch["input_ids"] >= 2) & ~firsts
    scores = batch["reference_logprob"]
    assert scores.shape == batch["input_ids"].shape and scores.dtype == torch.float32
    assert torch.equal(-scores[tokens], batch["input_ids"][tokens].float())
    assert scores[~tokens].isnan().all()
    weights = batch["token_weight"]
    assert torch.equal(2 * weights[tokens | firsts], batch["input_ids"][tokens | firsts].float())
    assert weights[batch["input_ids"] < 2].isnan().all()


def test_tensors_and_arrays_are_collated_as_lists_are():
    rows = tagged([4, 4])
    expected = ReferenceCollator(default_data_collator)(rows)["reference_logprob"]
    for kind in (torch.tensor, lambda values: torch.tensor(values).numpy()):
        same = [{key: kind(value) for key, value in row.items()} for row in rows]
        found = ReferenceCollator(default_data_collator)(same)["reference_logprob"]
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_examples_without_scores_are_left_alone_and_half_of_them_refused():
    rows = tagged([3, 4])
    without = [{k: v for k, v in row.items() if k not in BESIDE} for row in rows]
    assert "reference_logprob" not in ReferenceCollator(padding())(without)
    with pytest.raises(ValueError, match="example 1 of the batch has no reference_logprob"):
        ReferenceCollator(padding())([rows[0], without[1]])
    half: Any = [rows[0], rows[1] | {"reference_logprob": None}]  # as concatenated datasets have it
    with pytest.raises(ValueError, match="example 1 of the batch has no reference_logprob"):
        ReferenceCollator(padding())(half)
    rows[1]["reference_logprob"].append(-1.0)
    del rows[0]["token_weight"], rows[1]["token_weight"]
    with pytest.raises(ValueError, match="example 1 .* has 4 input_ids and 5 reference_logprob"):
        ReferenceCollator(padding())(rows)


def test_a_collator_that_does_not_answer_the_same_twice_is_refused():
    def crop(examples: list[Any]) -> Any:
        start = int(torch.randint(3, ()))
        return default_data_collator(
            [{k: v[start : start + 3] for k, v in e.items()} for e in examples]
        )

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="function does not put tokens at the same places twice"):
        for _ in range(20):
            ReferenceCollator(crop)(tagged([7, 7]))


def pops_labels(examples: list[Any]) -> dict[str, torch.Tensor]:
    labels = [torch.tensor(example.pop("labels")) for example in examples]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    return {"input_ids": pad(ids, True), "labels": pad(labels, True, -100)}


def pads_in_place(examples: list[Any]) -> Any:
    longest = max(len(example["input_ids"]) for example in examples)
    for example in examples:
        missing = longest - len(example["input_ids"])
        example["input_ids"] += [0] * missing
        example["labels"].extend([-100] * missing)
    return default_data_collator(examples)


@pytest.mark.parametrize("collator", [pops_labels, pads_in_place])
def test_a_collator_may_change_its_examples(collator):
    rows = tagged([3, 7, 5])
    expected = ReferenceCollator(padding())(tagged([3, 7, 5]))
    for _ in range(2):  # an in-place change would be there in the second epoch
        batch = ReferenceCollator(collator)(rows)
        for name in ("input_ids", "labels", "reference_logprob"):
            torch.testing.assert_close(batch[name], expected[name], equal_nan=True)
    assert rows[0]["input_ids"] == rows[0]["labels"] == tagged([3])[0]["input_ids"]


def test_null_is_nan():
    """Which is what NaN becomes on its way through JSON."""
    rows, collator = tagged([4, 4]), ReferenceCollator(default_data_collator)
    expected = collator(rows)["reference_logprob"]
    for row in rows:
        row["reference_logprob"][0] = None
    for form in (None, "numpy", "torch"):
        found = collator(list(dataset_of(rows).with_format(form)))
        torch.testing.assert_close(found["reference_logprob"], expected, equal_nan=True)
