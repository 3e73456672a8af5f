"""A reference model over your own tokenized dataset -> the dataset with its scores in a column.

Costs one forward pass. No logits are kept; a batch holds rows of similar length, padded at the end.
"""

import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, LargeList, List, Value
from transformers import PreTrainedModel

from slm.integrations.loss import COLUMN
from slm.integrations.signatures import check_parameters
from slm.model.architecture import position_limit
from slm.model.build import SelectiveLM, check_model, load_model
from slm.model.folder import model_sha256
from slm.prepare.imports.rows import Rows, check_dataset, read_rows
from slm.store.files import hash_json
from slm.store.hub import check_model_folder, is_folder
from slm.store.windows import IGNORE_INDEX, Batch, positions
from slm.version import __version__

NEEDED = ("with_indices", "features", "new_fingerprint", "desc")
check_parameters(Dataset.map, NEEDED, "datasets 5.2")

BATCHES_AT_ONCE = 16  # rows of similar length are scored together, out of so many batches
PROBE_TOKENS = 32


def score_dataset(
    dataset: Dataset, model: str | Path | PreTrainedModel, *, batch_size: int = 8
) -> Dataset:
    """The dataset with a column `reference_logprob`: log p(token | the tokens before it in its row,
    or in its document of the row), float32, NaN at the first token of each.

    dataset:     input_ids, rows of any length; seq_lengths or position_ids where a row is several
                 documents (those of TRL's packing), which are then scored apart
    model:       a causal LM: a folder or a hub name, on the GPU where there is one; or a loaded one
                 in float32, on its device
    batch_size:  rows of one forward

    TRL's pack_dataset takes the column along. Its strategy "wrapped" forgets where documents begin,
    so that their first tokens stay without a score: pack first, then score the packed rows.
    `datasets` caches the column under the hash of a folder's weights and the way it was computed
    (device, attention, dtype, versions); what a hub name or a loaded model gave is computed anew
    each time, since its weights have no such name. Scores are float32 also under autocast.
    """
    rows = check_dataset(dataset)
    if COLUMN in dataset.column_names:
        raise ValueError(f"the dataset has a column {COLUMN} already; remove it to score it again")
    lm = SelectiveLM(model if isinstance(model, PreTrainedModel) else load_folder(model))
    if lm.model.dtype != torch.float32:
        raise ValueError(f"the model is in {lm.model.dtype}; scores are made in torch.float32")
    training = lm.model.training
    lm.eval()
    try:
        with torch.autocast(lm.model.device.type, enabled=False):
            documents = bool({"seq_lengths", "position_ids"} & {*dataset.column_names})
            check_model(lm, probe(lm, documents))
            scored = rows.map(
                lambda table, numbers: score_table(lm, table, numbers[0], batch_size),
                with_indices=True,
                batched=True,
                batch_size=batch_size * BATCHES_AT_ONCE,
                features=scored_features(rows),
                new_fingerprint=scored_fingerprint(rows, model, lm, batch_size),
                desc="scoring",
            )
    finally:
        lm.model.train(training)
    return with_format_of(dataset, scored)  # type: ignore


def load_folder(name: str | Path) -> PreTrainedModel:
    if is_folder("model", str(name)):
        check_model_folder("model", str(name))
    model: Any = load_model(name)
    return model.cuda() if torch.cuda.is_available() else model


def probe(lm: SelectiveLM, documents: bool) -> Batch:
    """Two rows of any tokens."""
    limit, width = position_limit(lm.model.config), vocabulary(lm)
    length = PROBE_TOKENS if limit is None else min(PROBE_TOKENS, limit)
    ids = torch.arange(2 * length, device=lm.model.device).view(2, length) % width
    batch = {"input_ids": ids, "targets": ids.roll(-1, 1)}
    if documents:
        batch["position_ids"] = torch.arange(length, device=ids.device).expand_as(ids)
    return batch


def vocabulary(lm: SelectiveLM) -> int:
    embedding: Any = lm.model.get_input_embeddings()
    return len(embedding.weight)


def scored_features(rows: Dataset) -> Features:
    """Of the same kind of list as input_ids: TRL packs only columns of one kind."""
    kind = LargeList if isinstance(rows.features["input_ids"], LargeList) else List
    return Features({**rows.features, COLUMN: kind(Value("float32"))})


def scored_fingerprint(rows: Dataset, model: Any, lm: SelectiveLM, batch_size: int) -> str:
    if isinstance(model, PreTrainedModel) or not Path(model).is_dir():
        return uuid.uuid4().hex
    way = {"batch_size": batch_size} | way_of_computing(lm.model)
    return hash_json([rows._fingerprint, "score_dataset", model_sha256(model), way])


def way_of_computing(model: PreTrainedModel) -> dict[str, str]:
    """What changes scores of the same weights."""
    return {
        "device": model.device.type,
        "dtype": str(model.dtype),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "attn_implementation": str(model.config._attn_implementation),
        "slm": __version__,
    } | {name: version(name) for name in ("torch", "transformers")}


def with_format_of(dataset: Dataset, scored: Dataset) -> Dataset:
    """As the user had it, the new column among the formatted ones."""
    form: dict[str, Any] = dict(dataset.format)
    options = form.pop("format_kwargs")
    if form["columns"] is not None:
        form["columns"] = [*form["columns"], COLUMN]
    return scored.with_format(**form, **options)


def score_table(lm: SelectiveLM, table: pa.Table, number: int, batch_size: int) -> pa.Table:
    """The table with the new column; `number` is the first row's."""
    rows = read_rows(table, number, vocabulary(lm))
    check_fit(rows, position_limit(lm.model.config))
    scores = score_rows(lm, rows, batch_size)
    wrong = np.flatnonzero(~np.isfinite(scores) & ~rows.first)
    if len(wrong):
        at = wrong[0]
        raise ValueError(f"{rows.place('input_ids', at)}: the model's log-prob is {scores[at]}")
    return table.append_column(COLUMN, lists_beside(table.column("input_ids"), rows, scores))


def lists_beside(column: Any, rows: Rows, values: np.ndarray) -> pa.Array:
    """The n values as lists of the rows' lengths, of the kind that `column` holds."""
    large = pa.types.is_large_list(column.type)
    kind, width = (pa.LargeListArray, np.int64) if large else (pa.ListArray, np.int32)
    offsets = np.append(rows.starts, len(rows.ids)).astype(width)
    return kind.from_arrays(offsets, pa.array(values))


def check_fit(rows: Rows, limit: int | None) -> None:
    if limit is not None and rows.lengths.max() > limit:
        row = int(rows.lengths.argmax())
        raise ValueError(
            f"row {rows.number + row} has {rows.lengths[row]} tokens, the model's "
            f"max_position_embeddings is {limit}"
        )


def score_rows(lm: SelectiveLM, rows: Rows, batch_size: int) -> np.ndarray:  # (n,) float32
    scores = np.full(len(rows.ids), np.nan, np.float32)
    order = np.argsort(rows.lengths, kind="stable")
    order = order[rows.lengths[order] > 1]
    for at in range(0, len(order), batch_size):
        index, inside = padded(rows, order[at : at + batch_size])
        first = np.where(inside, rows.first[index], False)
        loss = token_loss(lm, rows.ids[index], inside, first)
        scores[index[:, 1:][inside[:, 1:]]] = -loss[:, :-1][inside[:, 1:]]
    scores[rows.first] = np.nan
    return scores


def padded(rows: Rows, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (B, L), (B, L) bool
    """Of rows beside each other: where each token stands among the n, and which are no padding."""
    lengths, column = rows.lengths[chosen, None], np.arange(rows.lengths[chosen].max())
    inside = column < lengths
    # Padding is at the end, where no token sees it: any will do.
    return rows.starts[chosen, None] + np.where(inside, column, 0), inside


@torch.no_grad()
def token_loss(
    lm: SelectiveLM, ids: np.ndarray, inside: np.ndarray, first: np.ndarray
) -> np.ndarray:  # (B, L) each; entry t is about the token that position t predicts
    targets = np.full_like(ids, IGNORE_INDEX)
    targets[:, :-1] = np.where(inside[:, 1:] & ~first[:, 1:], ids[:, 1:], IGNORE_INDEX)
    batch = {"input_ids": ids, "targets": targets}
    if first[:, 1:].any():
        batch["position_ids"] = positions(first)
    tensors = {name: torch.from_numpy(a).to(lm.model.device) for name, a in batch.items()}
    return lm(tensors).loss.cpu().numpy()
