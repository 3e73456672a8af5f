"""Losses of a frozen set of tokens at many checkpoints: a memory-mapped store that grows.

    dynamics/x/   plan.json               which tokens, of which corpus
                  windows.npy             int64 (W,): the windows, whole
                  losses-000000409600.npy float32 (M,): loss of every target of these windows, nats,
                                          after so many training tokens; its .json comes last
                  manifest.json           plan and checkpoints, written anew with each of them

M targets stand in the order of the windows and, within one, of the positions. A checkpoint that is
there already is left alone, so a command that is run again does what is missing.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from slm.data import IGNORE_INDEX, Windows, to_device
from slm.errors import UserError
from slm.model import SelectiveLM
from slm.shards import (
    FORMAT,
    Corpus,
    Json,
    adopt_plan,
    hash_file,
    hash_json,
    map_array,
    read_json,
    write_array,
    write_json,
)

KIND = "dynamics"


# ---- which tokens -------------------------------------------------------------------------------


def draw_windows(windows: Windows, num_targets: int, seed: int, by_source: bool) -> np.ndarray:
    """Whole windows, drawn by seed until they have `num_targets` targets; ascending, (W,) int64.

    by_source:  draw from the sources in turn, a window being of the source of most of its targets,
                so that rare sources have enough tokens to speak of
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(windows))
    if by_source:
        order = in_turn(order, main_sources(windows, order))
    live = np.concatenate([live_targets(windows, part).sum(1) for part in parts(order)])
    enough = int(np.searchsorted(np.cumsum(live), num_targets)) + 1
    return np.sort(order[:enough])


def parts(numbers: np.ndarray, size: int = 256) -> list[np.ndarray]:
    return np.split(numbers, range(size, len(numbers), size))


def live_targets(windows: Windows, numbers: np.ndarray) -> np.ndarray:  # (B, T) bool
    return windows.batch(numbers)["targets"].numpy() != IGNORE_INDEX


def main_sources(windows: Windows, numbers: np.ndarray) -> np.ndarray:  # (B,)
    found = [windows.sources(part) for part in parts(numbers)]
    return np.array([np.bincount(row).argmax() for rows in found for row in rows])


def in_turn(numbers: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The first of every source, then the second of every source, ..."""
    rank = np.empty(len(numbers), np.int64)
    for index in np.unique(source):
        mine = source == index
        rank[mine] = np.arange(mine.sum())
    return numbers[np.lexsort((source, rank))]


# ---- their losses -------------------------------------------------------------------------------


@torch.no_grad()
def token_losses(
    lm: SelectiveLM, windows: Windows, numbers: np.ndarray, batch_size: int
) -> np.ndarray:
    """(M,) float32, nats; the module's mode is put back, and no random number is drawn."""
    training, device = lm.training, next(lm.parameters()).device
    lm.eval()
    found = []
    for part in parts(numbers, batch_size):
        batch = windows.batch(part)
        loss = lm(to_device(batch, device)).loss.float().cpu()
        found.append(loss[batch["targets"] != IGNORE_INDEX].numpy())
    lm.train(training)
    return np.concatenate(found)


# ---- the store ----------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """One column of the store."""

    tokens_seen: int
    sha256: str
    num_tokens: int


class TrajectoryStore:
    """The losses of one token set at the checkpoints of one run."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.plan = read_plan(self.folder)

    @classmethod
    def create(cls, folder: str | Path, corpus: Corpus, numbers: np.ndarray, run: Json) -> Any:
        """Open or begin a store; `run` says whose losses they are. Another's is refused."""
        folder = Path(folder)
        plan = {
            "format": FORMAT,
            "kind": KIND,
            "corpus_fingerprint": corpus.fingerprint,
            "tokenizer_sha256": corpus.manifest["tokenizer_sha256"],
            "windows_sha256": hash_json(numbers.tolist()),
            "num_windows": len(numbers),
            "run": run,
        }
        adopt_plan(folder, plan)
        if not (folder / "windows.npy").exists():
            write_array(folder / "windows.npy", numbers)
        return cls(folder)

    @property
    def windows(self) -> np.ndarray:  # (W,)
        return map_array(self.folder / "windows.npy", "int64", self.plan["num_windows"])

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """In the order of training."""
        return [Checkpoint(**read_json(path)) for path in sorted(self.folder.glob("losses-*.json"))]

    def path(self, tokens_seen: int, suffix: str = ".npy") -> Path:
        return self.folder / f"losses-{tokens_seen:015d}{suffix}"

    def has(self, tokens_seen: int) -> bool:
        return self.path(tokens_seen, ".json").exists()

    def append(self, tokens_seen: int, losses: np.ndarray) -> None:
        """Write one checkpoint's losses (M,); its sidecar last."""
        self.check_losses(tokens_seen, losses)
        digest = write_array(self.path(tokens_seen), losses.astype(np.float32))
        record = Checkpoint(tokens_seen, digest, len(losses))._asdict()
        write_json(self.path(tokens_seen, ".json"), record)
        self.write_manifest()

    def check_losses(self, tokens_seen: int, losses: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise UserError(
                f"{self.folder}: after {tokens_seen:,} tokens the loss of token {bad[0]} is "
                f"{losses[bad[0]]}"
            )
        for before in self.checkpoints[:1]:
            if before.num_tokens != len(losses):
                raise UserError(
                    f"{self.folder} has losses of {before.num_tokens} tokens, {len(losses)} were "
                    f"found after {tokens_seen:,} training tokens"
                )

    def write_manifest(self) -> None:
        found = [checkpoint._asdict() for checkpoint in self.checkpoints]
        write_json(self.folder / "manifest.json", self.plan | {"checkpoints": found})

    def losses(self) -> list[np.ndarray]:
        """(M,) float32 each, memory-mapped, in the order of training."""
        return [
            map_array(self.path(c.tokens_seen), "float32", c.num_tokens) for c in self.checkpoints
        ]

    def forget_after(self, tokens_seen: int) -> None:
        """Of a run that goes on from an earlier checkpoint: what came later is made again."""
        for checkpoint in self.checkpoints:
            if checkpoint.tokens_seen > tokens_seen:
                self.path(checkpoint.tokens_seen, ".json").unlink()
                self.path(checkpoint.tokens_seen).unlink(missing_ok=True)
        self.write_manifest()

    def damaged(self) -> list[Path]:
        """Files whose hash is not the recorded one."""
        paths = [(self.path(c.tokens_seen), c.sha256) for c in self.checkpoints]
        return [path for path, digest in paths if not path.exists() or hash_file(path) != digest]


def read_plan(folder: Path) -> Json:
    if not (folder / "plan.json").exists():
        raise UserError(
            f"{folder} holds no token losses (plan.json is missing): see `slm dynamics`"
        )
    plan = read_json(folder / "plan.json")
    if plan.get("kind") != KIND:
        raise UserError(f"{folder}/plan.json: kind is {plan.get('kind')!r}, expected {KIND!r}")
    return plan
