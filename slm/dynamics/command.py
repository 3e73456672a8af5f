"""Token dynamics: the losses of a frozen set of tokens over training, and their classes.

`slm dynamics` takes them from the checkpoints of runs; the callback of callback.py
(`slm train callbacks=dynamics`) while a run trains. Both leave a store in <run>/dynamics/<name>:
see trajectories.py for what is in it, classes.py for H->H, L->H, H->L and L->L, and analysis.py for
what selection takes of them. Costs one forward pass over the token set for each checkpoint.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from slm.command_keys import DYNAMICS
from slm.console import progress
from slm.dynamics.analysis import Analysis, run_chooser
from slm.dynamics.classes import ARROWS, CLASSES, MIN_CHECKPOINTS
from slm.dynamics.stores import (
    class_rows,
    classify_run,
    draw,
    run_record,
    store_folder,
    warn_of_training_text,
)
from slm.dynamics.token_set import TokenSet
from slm.dynamics.trajectories import TrajectoryStore, make_plan, token_losses
from slm.errors import UserError
from slm.model.architecture import check_length
from slm.model.build import SelectiveLM
from slm.model.device import DTYPES, computing, pick_device
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.files import Json, read_json
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer
from slm.store.trust import refuse_code
from slm.store.windows import Windows, open_windows
from slm.train.checkpoint import read_checkpoint, read_sidecar, sidecar
from slm.train.curves import folders_of, run_folders

log = logging.getLogger("slm.dynamics")
EXACT = ("eager", "sdpa")  # attention that every machine has


def load_checkpoint(path: Path, corpus: Corpus) -> SelectiveLM:
    """The model of a checkpoint that fits the corpus."""
    saved = read_checkpoint(path)
    about = saved["about"]
    check_same_tokenizer(path, about["tokenizer_sha256"], corpus.folder, corpus)
    fields = json.loads(about["config"])
    refuse_code(str(path), fields)
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    check_length(config, corpus.seq_len)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=attention_of(path, about),
        trust_remote_code=False,
    )
    lm, prefix = SelectiveLM(model), "lm."
    lm.load_state_dict({k.removeprefix(prefix): v for k, v in saved["state_dict"].items()})
    return lm


def attention_of(path: Path, about: Json) -> str | None:
    """What the run computed with, where it is of EXACT; a folder's word fetches no kernel."""
    trained = about["attn_implementation"]
    if trained in EXACT:
        return trained
    if trained is not None:
        log.warning("%s: attention %r is not taken, losses differ by its rounding", path, trained)
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """Finished ones, in the order of training."""
    found = sorted((run / "checkpoints").glob("step-*.ckpt"))
    return [path for path in found if sidecar(path).exists()]


def tokens_seen_by(path: Path) -> int:
    """As its sidecar says: the file itself may have many gigabytes."""
    return read_sidecar(path)["tokens_seen"]


def missing(run: Path, store: TrajectoryStore) -> list[tuple[Path, int]]:
    """(checkpoint, tokens seen) of what the store lacks; a live run may remove one meanwhile."""
    found = []
    for path in checkpoints_of(run):
        with suppress(FileNotFoundError):
            found.append((path, tokens_seen_by(path)))
    return [(path, seen) for path, seen in found if not store.has(seen)]


def load_if_there(path: Path, corpus: Corpus) -> SelectiveLM | None:
    try:
        return load_checkpoint(path, corpus)
    except (UserError, OSError):
        if path.exists() and sidecar(path).exists():
            raise
    log.warning("%s is gone: its run goes on and keeps fewer checkpoints", path)
    return None


def fill(
    runs: Sequence[Path],
    stores: Sequence[TrajectoryStore],
    windows: Windows,
    tokens: TokenSet,
    where: torch.device,
    dtype: str,
    batch_size: int,
) -> None:
    """Append what each run's store lacks."""
    todo = [
        (store, path, seen)
        for run, store in zip(runs, stores, strict=True)
        for path, seen in missing(run, store)
    ]
    warn_of_new_classes([store for store, _, _ in todo])
    with progress("token losses", len(todo) * tokens.num_targets, "tokens") as advance:
        for store, path, seen in todo:
            lm = load_if_there(path, windows.corpus)
            if lm is not None:
                lm.to(where, DTYPES[dtype])
                with computing(where, dtype):
                    grid = token_losses(lm, windows, tokens.windows, batch_size)
                store.append(seen, grid[tokens.live])
                advance(tokens.num_targets)


def open_store(
    run: Path, windows: Windows, tokens: TokenSet, name: str, dtype: str, check: str
) -> TrajectoryStore:
    plan = make_plan(windows, tokens.windows, run_record(run), dtype)
    warn_of_training_text(windows.corpus, read_json(run / "run.json")["corpus"])
    store = TrajectoryStore.create(store_folder(run, name, ""), plan, tokens, check)
    run_chooser(store, warns=True)  # what would be noticed when it is too late
    return store


def warn_of_new_classes(stores: Sequence[TrajectoryStore]) -> None:
    for folder in dict.fromkeys(store.folder for store in stores):
        if (folder / "trajectories.npy").exists():
            log.warning("%s has classes already: with more checkpoints they are others", folder)


def analyse_stores(
    runs: Sequence[Path], stores: Sequence[TrajectoryStore], threshold: float, mean_loss: Any
) -> list[Analysis]:
    """Of the runs with enough checkpoints; the others are named."""
    found = []
    for run, store in zip(runs, stores, strict=True):
        count = len(store.checkpoints)
        if count < MIN_CHECKPOINTS:
            log.warning("%s has %d checkpoints, a trajectory needs %d", run, count, MIN_CHECKPOINTS)
            continue
        found.append(classify_run(store, run.name, threshold, mean_loss))
    if not found:
        raise UserError(
            f"none of the {len(runs)} runs has {MIN_CHECKPOINTS} checkpoints: train with "
            "callbacks.checkpoints.keep=null, or with callbacks=dynamics"
        )
    return found


# ---- the command --------------------------------------------------------------------------------


class Dynamics(NamedTuple):
    """Token losses and classes of runs."""

    analyses: list[Analysis]  # one a run

    @property
    def folders(self) -> list[Path]:
        """<run>/dynamics/<name> of each."""
        return [analysis.store.folder for analysis in self.analyses]

    @property
    def classes(self) -> list[Json]:
        """One row a run, checkpoint and class: its tokens, their loss, what the rule keeps."""
        rows = [(a.name, row) for a in self.analyses for row in class_rows(a)]
        return [{"run": name, **row} for name, row in rows]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Of each run: the share of its tokens in each class."""
        return {a.name: {k: share.share for k, share in a.shares.items()} for a in self.analyses}


@stage(DYNAMICS)
def dynamics(
    runs: Folder | Sequence[Folder],
    corpus: Folder,
    *,
    references: Folder | Sequence[Folder] | Mapping[str, Folder] | None = None,
    name: str = "checkpoints",
    combine: str | None = None,
    num_targets: int = 320_000,
    seed: int = 0,
    by_source: bool = False,
    threshold: float = 0.2,
    mean_loss: float | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "float32",
    modules: Sequence[str] = (),
    check: str = "size",
) -> Dynamics:
    """Evaluate a frozen set of tokens on the checkpoints of runs, and class each token.

    Args:
        runs: a folder with runs in it or below it, or a list of folders.
        corpus: held-out corpus to draw the tokens from.
        references: scores of that corpus, or a list of them: excess loss, keep rates.
        name: the store is <run>/dynamics/<name>.
        combine: of several references: mean, min or max of their losses, or mixture.
        num_targets: whole windows until there are so many.
        seed: which windows.
        by_source: the corpus's sources in turn, so that rare ones have tokens too.
        threshold: nats; less change than this is L->L or H->H.
        mean_loss: nats, the level between L->L and H->H; None: the mean of the last checkpoint.
        batch_size: windows per forward.
        device: "auto" is cuda where there is one.
        dtype: float32, bfloat16 or bf16-mixed.
        modules: files or dotted names that hold rules or modeling code of your own.
        check: "size", or "full" to compare every file's hash first.

    Returns:
        The stores, one a run, with what `slm report` shows of them.

    Raises:
        UserError: a setting does not fit, or no run has enough checkpoints.
    """
    where = pick_device(device)
    import_modules(modules)
    folders = run_folders(folders_of(runs))
    held: Any = references
    windows = open_windows(Corpus.open(str(corpus), check), held, combine, check, prefix="")
    tokens = draw(windows, num_targets, seed, by_source)
    stores = [open_store(run, windows, tokens, name, dtype, check) for run in folders]
    fill(folders, stores, windows, tokens, where, dtype, batch_size)
    return Dynamics(analyse_stores(folders, stores, threshold, mean_loss))


def print_table(analyses: Sequence[Analysis]) -> None:
    table = Table("run", "class", "tokens", "share", "95%", "loss, first", "last", "kept, last")
    for analysis in analyses:
        for number, name in enumerate(CLASSES):
            share, losses = analysis.shares[name], analysis.class_losses[:, number]
            kept = "" if analysis.kept is None else f"{analysis.kept.by_class[-1, number]:.1%}"
            table.add_row(
                escape(analysis.name) if number == 0 else "",
                ARROWS[name],
                f"{share.num_tokens:,}",
                *(f"{share.share:.1%}", f"{share.low:.1%} to {share.high:.1%}"),
                *(f"{losses[0]:.3f}", f"{losses[-1]:.3f}", kept),
            )
    Console().print(table)


def run(**settings: Any) -> None:
    made = dynamics(**settings)
    print_table(made.analyses)
    for folder in made.folders:
        log.info("%s", folder)
