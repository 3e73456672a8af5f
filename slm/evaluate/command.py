"""Mean loss in nats per token and bits per byte of models on named sets: `slm evaluate`.

    slm evaluate 'models={base: runs/base/model}' 'sets={math: corpus/heldout}' out=table.csv

Costs one forward pass; no logits are kept.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slm.command_keys import EVALUATE, PRECISIONS
from slm.console import progress
from slm.evaluate.figures import draw_positions
from slm.evaluate.losses import CorpusLoss, WindowLosses
from slm.evaluate.positions import PositionLosses, Range, check_ends
from slm.model.architecture import check_length, positions_of
from slm.model.build import SelectiveLM, load_model
from slm.model.device import DTYPES, computing, pick_device
from slm.score.command import check_fits
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.fields import OBJECT, check_fields, one_of
from slm.store.files import Advance, nothing, read_json, write_csv
from slm.store.hub import check_model_folder, is_folder
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer, load_tokenizer, with_eos_of
from slm.store.windows import IGNORE_INDEX, Windows, spread, to_device, turns

log = logging.getLogger("slm.evaluate")
Override = Mapping[str, Any] | None  # of fields of a model's config


def unwatched(token_loss: torch.Tensor) -> None:
    """Nobody asks for the losses of single tokens."""


@torch.no_grad()
def window_losses(
    lm: SelectiveLM,
    corpus: Corpus,
    batch_size: int,
    max_windows: int | None = None,
    advance: Advance = nothing,
    rank: int = 0,
    ranks: int = 1,
    watch: Callable[[torch.Tensor], None] = unwatched,
    positions: PositionLosses | None = None,
) -> WindowLosses:
    """Evaluate `lm` on the windows of `corpus` (at most `max_windows`, evenly spread).

    The module's mode is put back afterwards, and no random number is drawn. `advance` is told the
    number of tokens after each batch, `watch` gets its token losses (B, T), `positions` adds them
    up by position. One of several ranks has every so many-th batch, and calls `lm` as often as the
    others.
    """
    windows = Windows(corpus)
    chosen = spread(len(windows), max_windows)
    device = lm.device
    training = lm.training
    lm.eval()
    exact = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    nats, targets, num_bytes = [], [], []
    parts = np.split(chosen, range(batch_size, len(chosen), batch_size))
    for turn in turns(len(parts), rank, ranks):
        part = parts[min(turn, len(parts) - 1)]
        batch = windows.batch(part)
        live = batch["targets"] != IGNORE_INDEX
        sizes = windows.target_bytes(part) * live
        targets.append(live.sum(1))
        num_bytes.append(sizes.sum(1))
        loss = lm(to_device(batch, device)).loss
        watch(loss)
        if positions is not None:
            positions.add(batch, live, sizes, loss)
        nats.append(loss.to(exact).double().sum(1))
        advance(live.numel())
    lm.train(training)
    mine = np.concatenate([chosen[:0], *parts[rank::ranks]])
    columns = (torch.cat(column).cpu().numpy() for column in (nats, targets, num_bytes))
    return WindowLosses(mine, *(column[: len(mine)] for column in columns))


def corpus_loss(
    lm: SelectiveLM,
    corpus: Corpus,
    batch_size: int,
    max_windows: int | None = None,
    advance: Advance = nothing,
) -> CorpusLoss:
    """Mean of `window_losses`."""
    return window_losses(lm, corpus, batch_size, max_windows, advance).total()


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


def check_models(
    models: Mapping[str, str],
    corpora: Mapping[str, Corpus],
    longest: Mapping[str, int],
    override: Override,
    check: str = "size",
) -> None:
    """Refuse what can be before the first forward. longest: tokens, by what has so many"""
    for folder in models.values():
        if is_folder("model", folder):
            check_model_folder("model", folder, check)
        own = load_tokenizer(folder, needs_eos=False)
        for corpus in corpora.values():
            tokenizer = with_eos_of(folder, own, corpus)
            check_same_tokenizer(f"model {folder}", tokenizer, corpus.folder, corpus)
        limit = positions_of(folder, None, override)
        for name, length in longest.items():
            what = f"model {folder}, {name}:"
            check_length(limit, length, what, "override={override} asks it all the same")


def evaluated(
    models: Mapping[str, str],
    corpora: Mapping[str, Corpus],
    max_windows: Mapping[str, int | None],
    batch_size: int,
    dtype: str,
    device: str = "auto",
    check: str = "size",
    override: Override = None,
    positions: dict[tuple[str, str], PositionLosses] | None = None,
) -> dict[tuple[str, str], WindowLosses]:
    """By the names of model and set; `positions` gets those of each pair."""
    where = pick_device(device)
    longest = {f"set {name}": corpus.seq_len for name, corpus in corpora.items()}
    check_models(models, corpora, longest, override, check)
    for folder in models.values():
        warn_of_other_precision(folder, dtype)
    total = sum(num_tokens(corpus, max_windows[name]) for name, corpus in corpora.items())
    found = {}
    with progress("evaluating", total * len(models), "tokens") as advance:
        for model, folder in models.items():
            lm = SelectiveLM(load_model(folder, override=override))
            for corpus in corpora.values():
                check_fits(lm, corpus)
            lm.to(where, DTYPES[dtype])
            for name, corpus in corpora.items():
                by_position = None
                if positions is not None:
                    by_position = positions[model, name] = PositionLosses(corpus.seq_len)
                with computing(where, dtype):
                    found[model, name] = window_losses(
                        *(lm, corpus, batch_size, max_windows[name], advance),
                        positions=by_position,
                    )
    return found


@stage(EVALUATE)
def evaluate(
    models: Mapping[str, Folder],
    sets: Mapping[str, Folder],
    *,
    batch_size: int = 32,
    max_windows: int | None = None,
    by_position: Sequence[int] | None = None,
    override: Override = None,
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
        by_position: also losses by position in the window: where ranges of positions end, [64,
            128, 256]; the last one ends with the window.
        override: fields of the models' configs with other values, as model.override of training:
            {"max_position_embeddings": 512, "rope_theta": 250000}.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.
        check: "full" compares every file's hash first.
        out: a CSV file for the rows; with by_position a figure beside it, .png.

    Returns:
        A row for every model and set: model, set, loss (nats per target), bits_per_byte,
        num_targets, num_bytes. `pandas.DataFrame(rows)` makes a table of them. With by_position
        from_position and to_position too, and a row for every range after that of the whole.

    Raises:
        UserError: a folder is damaged, or no model or set of that tokenizer; a setting is wrong.
    """
    import_modules(modules)
    corpora = {name: Corpus.open(folder, check) for name, folder in sets.items()}
    folders = {name: str(folder) for name, folder in models.items()}
    limits = dict.fromkeys(corpora, max_windows)
    check_ends(by_position or (), {name: corpus.seq_len for name, corpus in corpora.items()})
    positions: dict[tuple[str, str], PositionLosses] = {}
    way = (batch_size, dtype, device, check, override)
    found = evaluated(folders, corpora, limits, *way, positions if by_position else None)
    rows, ranges = [], []
    for (model, name), losses in found.items():
        names, whole = {"model": model, "set": name}, losses.total()
        if not by_position:
            rows.append(names | whole._asdict())
            continue
        rows.append(names | Range(0, corpora[name].seq_len, whole).row())
        parts = positions[model, name].ranges(by_position)
        ranges += (mine := [names | part.row() for part in parts])
        rows += mine
    if out is not None:
        write_csv(Path(out), rows)
        if by_position:
            draw_positions(ranges, Path(out).with_suffix(".png"))
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    by_position = "from_position" in rows[0]
    places = ["positions"] if by_position else []
    table = Table("model", "set", *places, "loss (nats)", "bits per byte", "targets")
    for row in rows:
        numbers = (f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}", f"{row['num_targets']:,}")
        span = [f"{row['from_position']:,} to {row['to_position']:,}"] if by_position else []
        table.add_row(escape(row["model"]), escape(row["set"]), *span, *numbers)
    Console().print(table)


def run(**settings: Any) -> None:
    print_table(evaluate(**settings))
    if settings["out"] is not None:
        log.info(f"table: {settings['out']}")
