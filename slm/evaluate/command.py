"""Mean loss in nats per token and bits per byte of models on named sets: `slm evaluate`.

    slm evaluate 'models={base: runs/base/model}' 'sets={math: corpus/heldout}' out=table.csv

bits per byte = nats summed over the targets / (ln 2 * UTF-8 bytes of those targets). EOS counts its
nats and no bytes. It is the measure that compares tokenizers and select ratios alike. Costs one
forward pass; no logits are kept.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slm.command_keys import EVALUATE, PRECISIONS
from slm.console import progress
from slm.model.build import SelectiveLM, load_model
from slm.model.device import DTYPES, computing, pick_device
from slm.model.folder import check_model_folder
from slm.score.command import check_fits
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.fields import OBJECT, check_fields, one_of
from slm.store.files import Advance, nothing, read_json, write_csv
from slm.store.hub import is_folder
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer, load_tokenizer
from slm.store.windows import IGNORE_INDEX, Windows, spread, to_device

log = logging.getLogger("slm.evaluate")


class CorpusLoss(NamedTuple):
    """Loss of one model on one set."""

    loss: float  # nats per target
    bits_per_byte: float
    num_targets: int
    num_bytes: int


@torch.no_grad()
def corpus_loss(
    lm: SelectiveLM,
    corpus: Corpus,
    batch_size: int,
    max_windows: int | None = None,
    advance: Advance = nothing,
) -> CorpusLoss:
    """Evaluate `lm` on the windows of `corpus` (at most `max_windows`, evenly spread).

    The module's mode is put back afterwards, and no random number is drawn. `advance` is told the
    number of tokens after each batch.
    """
    windows = Windows(corpus)
    chosen = spread(len(windows), max_windows)
    device = next(lm.parameters()).device
    training = lm.training
    lm.eval()
    exact = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    nats = torch.zeros((), dtype=torch.float64, device=exact)
    num_targets = num_bytes = 0
    for part in np.split(chosen, range(batch_size, len(chosen), batch_size)):
        batch = windows.batch(part)
        live = batch["targets"] != IGNORE_INDEX
        num_targets += int(live.sum())
        num_bytes += int(windows.target_bytes(part)[live].sum())
        nats += lm(to_device(batch, device)).loss.to(exact).double().sum()
        advance(live.numel())
    lm.train(training)
    return mean_loss(nats.item(), num_targets, num_bytes)


def mean_loss(nats: float, num_targets: int, num_bytes: int) -> CorpusLoss:
    """NaN where there is nothing to divide by."""
    loss = nats / num_targets if num_targets else math.nan
    bits = nats / (math.log(2) * num_bytes) if num_bytes else math.nan
    return CorpusLoss(loss, bits, num_targets, num_bytes)


# ---- the command --------------------------------------------------------------------------------


def num_tokens(corpus: Corpus, max_windows: int | None) -> int:
    return len(spread(corpus.num_windows, max_windows)) * corpus.seq_len


def warn_of_other_precision(folder: str, dtype: str) -> None:
    """The held-out losses of a run are computed as it trains."""
    path = Path(folder) / "slm.json"
    record = read_json(path) if path.is_file() else {"lineage": {}}
    check_fields(path, record, {"lineage": OBJECT})
    if "precision" not in record["lineage"]:
        return
    check_fields(path, record["lineage"], {"precision": one_of(*PRECISIONS)})
    trained = PRECISIONS[record["lineage"]["precision"]]
    if trained != dtype:
        log.warning(
            "%s was trained in %s, and so were its held-out losses: dtype=%s gives the same ones, "
            "%s others",
            *(folder, trained, trained, dtype),
        )


@stage(EVALUATE)
def evaluate(
    models: Mapping[str, Folder],
    sets: Mapping[str, Folder],
    *,
    batch_size: int = 32,
    max_windows: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    modules: Sequence[str] = (),
    check: str = "size",
    out: Folder | None = None,
) -> list[dict[str, Any]]:
    """Mean loss and bits per byte of models on named sets.

    Args:
        models: name -> model folder.
        sets: name -> corpus folder, made with the models' tokenizer.
        batch_size: windows per forward.
        max_windows: at most so many of each set, evenly spread.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.
        check: "full" compares every file's hash first.
        out: a CSV file for the rows.

    Returns:
        A row for every model and set: model, set, loss (nats per target), bits_per_byte,
        num_targets, num_bytes. `pandas.DataFrame(rows)` makes a table of them.

    Raises:
        UserError: a folder is damaged, or no model or set of that tokenizer; a setting is wrong.
    """
    where = pick_device(device)
    import_modules(modules)
    corpora = {name: Corpus.open(folder, check) for name, folder in sets.items()}
    folders = {name: str(folder) for name, folder in models.items()}
    for folder in folders.values():  # all of them before the first forward
        if is_folder("model", folder):
            check_model_folder("model", folder, check)
        tokenizer = load_tokenizer(folder)
        for corpus in corpora.values():
            check_same_tokenizer(f"model {folder}", tokenizer, corpus.folder, corpus)
        warn_of_other_precision(folder, dtype)
    total = sum(num_tokens(corpus, max_windows) for corpus in corpora.values())
    rows = []
    with progress("evaluating", total * len(models), "tokens") as advance:
        for name, folder in folders.items():
            lm = SelectiveLM(load_model(folder))
            for corpus in corpora.values():
                check_fits(lm, corpus)
            lm.to(where, DTYPES[dtype])
            for set_name, corpus in corpora.items():
                with computing(where, dtype):
                    result = corpus_loss(lm, corpus, batch_size, max_windows, advance)
                rows.append({"model": name, "set": set_name} | result._asdict())
    if out is not None:
        write_csv(Path(out), rows)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("model", "set", "loss (nats)", "bits per byte", "targets")
    for row in rows:
        numbers = (f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}", f"{row['num_targets']:,}")
        table.add_row(escape(row["model"]), escape(row["set"]), *numbers)
    Console().print(table)


def run(**settings: Any) -> None:
    print_table(evaluate(**settings))
    if settings["out"] is not None:
        log.info(f"table: {settings['out']}")
