"""Preference pairs as token ids, and a reference model's log-probs beside their responses.

    pairs = pairs_dataset("pairs.jsonl")               # of `slm pivots`, or your own
    pairs = score_pairs(pairs, "runs/reference/model")

A response is what it says, to the token: nothing is tokenized, and no end is put after it.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel

from slm.checks import Kind
from slm.errors import UserError, shown
from slm.integrations.collator import IDS, REFERENCES, SIDES
from slm.integrations.datasets.scores import score_dataset
from slm.integrations.loss import COLUMN

TOKENS = Kind(
    "a list of at least one token id",
    lambda v: isinstance(v, list) and len(v) > 0 and all(type(i) is int and i >= 0 for i in v),
)
INTEGERS = List(Value("int64"))


def pairs_dataset(path: str | Path) -> Dataset:
    """The pairs of a JSON-lines file: columns prompt_ids, chosen_ids and rejected_ids.

    path: a record a line with these three fields, as `slm pivots` writes `pairs.jsonl`; its other
          fields are left out, texts too, since a trainer that finds a text tokenizes it again

    UserError names the line of a pair without a prompt (nothing predicts a row's first token) or
    response, or whose responses are the same.
    """
    with open(path, "rb") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    rows = [read_pair(line, f"{path}:{number}") for number, line in lines]
    if not rows:
        raise UserError(f"{path} has no pairs")
    return Dataset.from_list(rows, features=Features(dict.fromkeys(IDS, INTEGERS)))


def read_pair(line: bytes, where: str) -> dict[str, list[int]]:
    try:
        record = json.loads(line)
        pair = {name: record[name] for name in IDS}
    except KeyError as error:
        raise UserError(f"{where}: field {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None
    for name, ids in pair.items():
        if not TOKENS.fits(ids):
            raise UserError(f"{where}: {name} is {shown(ids)}, it must be {TOKENS.wanted}")
    if pair["chosen_ids"] == pair["rejected_ids"]:
        raise UserError(
            f"{where}: chosen_ids and rejected_ids are both {shown(pair['chosen_ids'])}"
        )
    return pair


def score_pairs(
    pairs: Dataset, model: str | Path | PreTrainedModel, *, batch_size: int = 8
) -> Dataset:
    """The pairs with `chosen_reference_logprob` and `rejected_reference_logprob`: of each token of
    a response log p(token | the prompt and the response before it), float32.

    model and batch_size: as score_dataset takes them, which makes and caches the scores
    """
    for side, column in zip(SIDES, REFERENCES, strict=True):
        scores: Any = side_scores(pairs, side, model, batch_size)
        added: Any = pairs.add_column(column, scores, feature=List(Value("float32")))
        pairs = added
    return pairs


def side_scores(pairs: Dataset, side: str, model: Any, batch_size: int) -> list[list[float]]:
    def joined(row: dict[str, list[int]]) -> dict[str, list[int]]:
        return {"input_ids": row["prompt_ids"] + row[f"{side}_ids"]}

    rows: Any = pairs.map(joined, remove_columns=pairs.column_names, desc=f"joining {side}")
    scored = score_dataset(rows, model, batch_size=batch_size)
    prompts = pairs["prompt_ids"]
    return [row[len(ids) :] for row, ids in zip(scored[COLUMN], prompts, strict=True)]
