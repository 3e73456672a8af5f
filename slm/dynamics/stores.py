"""What the two ways to token dynamics share: the tokens, a run's store, its classes."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.analysis import Analysis, analyse
from slm.dynamics.classes import CLASSES
from slm.dynamics.token_set import TokenSet, draw_windows, read_windows
from slm.dynamics.trajectories import TrajectoryStore
from slm.names import path_component
from slm.store.files import Json, hash_json, nested, read_json
from slm.store.shards import Corpus
from slm.store.tokenizer import load_corpus_tokenizer
from slm.store.windows import Windows

log = logging.getLogger("slm.dynamics")


def draw(windows: Windows, num_targets: int, seed: int, by_source: bool) -> TokenSet:
    numbers = draw_windows(windows, num_targets, seed, by_source)
    tokens = read_windows(windows, numbers, load_corpus_tokenizer(windows.corpus))
    if tokens.num_targets < num_targets:
        log.warning(
            "%s has %s targets, fewer than num_targets=%s: all of them are taken",
            *(windows.corpus.folder, f"{tokens.num_targets:,}", f"{num_targets:,}"),
        )
    return tokens


def store_folder(run: Path, name: Any, prefix: str) -> Path:
    return run / "dynamics" / path_component(f"{prefix}name", name)


def run_record(run: Path) -> Json:
    """What the losses depend on of a run, and the rule that it selects with."""
    identity = read_json(run / "run.json")
    return {
        "identity_sha256": hash_json(identity),
        "seed": identity["seed"],
        "selection": nested(identity, "selection."),
        "selection_start": identity["selection_start"],
        "micro_batch_size": identity["data.micro_batch_size"],
    }


def classify_run(store: TrajectoryStore, name: str, threshold: float, mean_loss: Any) -> Analysis:
    """The final classes: one record a token, and a table a checkpoint and class."""
    analysis = analyse(store, name, threshold, mean_loss)
    store.write_classes(analysis.trajectories, class_rows(analysis), threshold, mean_loss)
    if analysis.uneven:
        log.warning(
            "%s: the checkpoints are unevenly spaced in tokens (%s); the line is fitted over "
            "their indices, as in the paper",
            *(store.folder, ", ".join(f"{seen:,}" for seen in analysis.tokens_seen[:8])),
        )
    return analysis


def class_rows(analysis: Analysis) -> list[Json]:
    """One row a checkpoint and class, by the final classes; empty where there is nothing."""
    rows = []
    for index, seen in enumerate(analysis.tokens_seen):
        for number, name in enumerate(CLASSES):
            share = analysis.shares[name]
            kept = analysis.kept.by_class[index, number] if analysis.kept else np.nan
            row = {"tokens_seen": int(seen), "class": name} | share._asdict()
            row |= {"loss": analysis.class_losses[index, number], "kept_frac": kept}
            rows.append({k: "" if v != v else v for k, v in row.items()})
    return rows


def warn_of_training_text(corpus: Corpus, fingerprint: str) -> None:
    if corpus.fingerprint == fingerprint:
        log.warning("%s is what the run trains on: its tokens are not held out", corpus.folder)
