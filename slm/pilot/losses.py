"""What was measured on held-out text: the loss of every token, and its sums over documents.

    <run>/tokens/<set>-<tokens seen>.npy    float32 (windows, seq_len), nats; kept as the run trains
    reference/tokens/<set>-0.npy            of the reference model

Documents are the unit of all intervals: what differs between two texts of one kind are documents,
not the windows that they were cut into.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning import Trainer
from torch import Tensor

from slm.evaluate.command import window_losses
from slm.model.build import SelectiveLM
from slm.names import file_name
from slm.store.files import write_array
from slm.store.shards import Corpus
from slm.store.windows import IGNORE_INDEX, Windows, spread
from slm.train.callbacks.base import datamodule_of
from slm.train.callbacks.heldout import HeldoutLoss

MOST_BYTES = 150  # of a set's name in a file's


class HeldoutSet:
    """The windows of a corpus that all models are evaluated on, and whose token is whose."""

    def __init__(self, name: str, corpus: Corpus, max_windows: int):
        self.name, self.corpus, self.max_windows = name, corpus, max_windows
        self.windows = Windows(corpus)
        self.chosen = spread(len(self.windows), max_windows)  # (W,)

    @cached_property
    def live(self) -> np.ndarray:  # (W, T) bool
        return self.windows.batch(self.chosen)["targets"].numpy() != IGNORE_INDEX

    @cached_property
    def origins(self) -> np.ndarray:  # (W, T, 2): source and record
        return self.windows.origins(self.chosen)

    @cached_property
    def documents(self) -> np.ndarray:  # (W, T): 0 to D - 1
        pairs = self.origins.reshape(-1, 2)
        return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(self.live.shape)

    def sums(self, values: np.ndarray, tokens: np.ndarray) -> np.ndarray:  # (W, T) each -> (D,)
        """Over those of `tokens`, of each document."""
        size = int(self.documents.max()) + 1
        return np.bincount(self.documents[tokens], values[tokens], minlength=size)

    def path(self, folder: Path, tokens_seen: int) -> Path:
        return folder / "tokens" / f"{file_name(self.name, MOST_BYTES)}-{tokens_seen}.npy"

    def read(self, folder: Path, tokens_seen: int) -> np.ndarray:  # (W, T)
        return np.load(self.path(folder, tokens_seen), allow_pickle=False)


class TokenLosses(HeldoutLoss):
    """HeldoutLoss that keeps the loss of every token. The sets of `at_ends` are read before the
    training and after it, the others at every turn."""

    def __init__(self, sets: Mapping[str, HeldoutSet], at_ends: Sequence[str], **usual: Any):
        super().__init__(**usual)
        self.own, self.at_ends = sets, set(at_ends)
        self.kept: dict[str, list[np.ndarray]] = {}

    def sets(self, trainer: Trainer) -> dict[str, Corpus]:
        is_end = trainer.global_step in (0, trainer.max_steps)
        every = super().sets(trainer)
        return {name: held for name, held in every.items() if is_end or name not in self.at_ends}

    def watch(self, name: str, token_loss: Tensor) -> None:
        self.kept[name].append(token_loss.float().cpu().numpy())

    def evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        self.kept = defaultdict(list)
        super().evaluate(trainer, pl_module)
        seen = trainer.global_step * datamodule_of(trainer).tokens_per_step
        for name, parts in self.kept.items():
            save(self.own[name].path(self.run_dir, seen), parts)


def save(path: Path, parts: Sequence[np.ndarray]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_array(path, np.concatenate(parts))


def evaluate_model(
    lm: SelectiveLM, sets: Sequence[HeldoutSet], folder: Path, batch_size: int
) -> None:
    """Keep the token losses of a model that is not trained here."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in sets:
        parts: list[np.ndarray] = []
        window_losses(
            *(lm, one.corpus, batch_size, one.max_windows),
            watch=lambda loss, parts=parts: parts.append(loss.float().cpu().numpy()),
        )
        save(one.path(folder, 0), parts)


# ---- sums over documents ------------------------------------------------------------------------


class Measured(NamedTuple):
    """The losses of all arms on one set, or on some of its tokens."""

    name: str
    targets: np.ndarray  # (D,), those without targets are left out
    seen: np.ndarray  # (P,), training tokens at each measurement
    nats: dict[str, dict[int, np.ndarray]]  # arm -> seed -> (P, D)


def measured(
    one: HeldoutSet,
    runs: Mapping[str, Mapping[int, Path]],
    seen: Sequence[int],
    tokens: np.ndarray | None = None,
    name: str | None = None,
) -> Measured:
    """runs: arm -> seed -> the folder with its token losses at each of `seen`

    tokens: those (W, T) that count; None: all
    """
    among = one.live if tokens is None else one.live & tokens
    targets = one.sums(np.ones(among.shape), among)
    there = targets > 0

    def sums(folder: Path) -> np.ndarray:  # (P, D)
        return np.array([one.sums(one.read(folder, point), among)[there] for point in seen])

    nats = {arm: {seed: sums(folder) for seed, folder in of.items()} for arm, of in runs.items()}
    return Measured(name or one.name, targets[there], np.array(seen), nats)


def with_base(found: Measured, base: str, like: str) -> Measured:
    """The model before training as one more arm, `base`, which each seed of `like` began with."""
    still = {s: np.repeat(nats[:1], len(nats), 0) for s, nats in found.nats[like].items()}
    return found._replace(nats=found.nats | {base: still})
