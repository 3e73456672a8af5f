"""Losses of a frozen set of tokens at many checkpoints: a memory-mapped store that grows.

    dynamics/x/   plan.json               whose losses, on which tokens
                  windows.npy, ...        the tokens, see token_set.py
                  losses-000000409600.npy float32 (M,): loss of every target, nats, after so many
                                          training tokens; its .json comes last
                  manifest.json           plan, token set and checkpoints, written anew with each
                  trajectories.npy        structured (M,): fits and classes, see classes.py
                  classes.json, .csv      threshold and level; the classes at each checkpoint

A checkpoint that is there already is left alone, so a command that is run again does what is
missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from slm.dynamics.classes import Trajectories
from slm.dynamics.token_set import (
    TokenSet,
    parts,
    read_token_set,
    token_set_files,
    write_token_set,
)
from slm.errors import UserError
from slm.model.build import SelectiveLM
from slm.store.claims import remove_temporaries
from slm.store.fields import INDEX, OBJECT, SHA256, SIZE, TEXT, check_fields, list_of
from slm.store.files import (
    Json,
    check_files,
    check_hash,
    hash_file,
    hash_json,
    map_array,
    read_json,
    write_array,
    write_csv,
    write_json,
    write_record,
)
from slm.store.shards import FORMAT, adopt_plan
from slm.store.windows import IGNORE_INDEX, Windows, to_device

KIND = "dynamics"
RUN = {"seed": INDEX, "selection": OBJECT, "selection_start": INDEX, "micro_batch_size": SIZE}
LOSS_FILES = ("losses-*.json", "losses-*.npy", "trajectories.npy", "classes.*", "manifest.json")


@torch.no_grad()
def token_losses(
    lm: SelectiveLM, windows: Windows, numbers: np.ndarray, batch_size: int
) -> np.ndarray:
    """(B, T) float32, nats, NaN where there is no target.

    The module's mode is put back, and no random number is drawn.
    """
    training, device = lm.training, lm.device
    lm.eval()
    found = []
    for part in parts(numbers, batch_size):
        batch = windows.batch(part)
        loss = lm(to_device(batch, device)).loss.float().cpu()
        found.append(loss.masked_fill(batch["targets"] == IGNORE_INDEX, torch.nan).numpy())
    lm.train(training)
    return np.concatenate(found)


class Checkpoint(NamedTuple):
    """One column of the store."""

    tokens_seen: int
    sha256: str
    num_tokens: int


def read_checkpoint(path: Path) -> Checkpoint:
    """One column's sidecar, whose name says the same as its content."""
    record = read_json(path)
    check_fields(path, record, {"tokens_seen": INDEX, "sha256": SHA256, "num_tokens": SIZE})
    if path.name != f"losses-{record['tokens_seen']:015d}.json":
        raise UserError(f"{path}: tokens_seen is {record['tokens_seen']}, its name says another")
    return Checkpoint(**{name: record[name] for name in Checkpoint._fields})


def make_plan(windows: Windows, numbers: np.ndarray, run: Json, dtype: str) -> Json:
    """What the losses depend on."""
    manifest = windows.corpus.manifest
    return {
        "format": FORMAT,
        "kind": KIND,
        "corpus_fingerprint": windows.corpus.fingerprint,
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "sources": manifest["sources"],
        "references": [store.fingerprint for store in windows.references],
        "combine": windows.combine,
        "windows_sha256": hash_json(numbers.tolist()),
        "num_windows": len(numbers),
        "dtype": dtype,
        "run": run,
    }


def remove_store(folder: Path) -> None:
    """Of a run that starts anew: the files of a store, and only of one; others stay."""
    if (folder / "plan.json").exists():
        if (found := read_json(folder / "plan.json").get("kind")) != KIND:
            raise UserError(f"{folder}/plan.json: kind is {found!r}, expected {KIND!r}")
        # The plan last: killed in between, it still says whose.
        for pattern in (*LOSS_FILES, *token_set_files(), ".*.tmp", "plan.json"):
            for path in sorted(folder.glob(pattern)):
                path.unlink()


class TrajectoryStore:
    """The losses of one token set at the checkpoints of one run."""

    def __init__(self, folder: str | Path, check: str = "size"):
        """check: "full" compares the hash of every column's file"""
        self.folder = Path(folder)
        self.plan = read_plan(self.folder)
        self.tokens = read_token_set(self.folder)
        if check == "full":
            self.check_hashes()

    @classmethod
    def create(cls, folder: str | Path, plan: Json, tokens: TokenSet, check: str = "size") -> Any:
        """Open or begin a store; another run's, or one of other tokens, is refused."""
        folder = Path(folder)
        adopt_plan(folder, plan, "other losses", "another name")
        remove_temporaries(folder)
        if not (folder / "token_set.json").exists():
            write_token_set(folder, tokens)
        store = cls(folder, check)
        if store.checkpoints:
            store.write_manifest()  # a kill may have come between it and the last column
        return store

    def check_hashes(self) -> None:
        check_files(self.folder / "token_set.json", read_json(self.folder / "token_set.json"))
        for checkpoint in self.checkpoints:
            path = self.path(checkpoint.tokens_seen)
            check_hash(path, checkpoint.sha256, path.with_suffix(".json").name)

    @property
    def sources(self) -> list[str]:
        return self.plan["sources"]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """In the order of training."""
        return [read_checkpoint(path) for path in sorted(self.folder.glob("losses-*.json"))]

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
        if len(losses) != self.tokens.num_targets:
            raise UserError(
                f"{self.folder} is about {self.tokens.num_targets} tokens, {len(losses)} losses "
                f"were found after {tokens_seen:,} training tokens"
            )

    def write_manifest(self) -> None:
        write_json(self.folder / "manifest.json", self.make_manifest())

    def make_manifest(self) -> Json:
        found = [checkpoint._asdict() for checkpoint in self.checkpoints]
        record = {"token_set": read_json(self.folder / "token_set.json"), "checkpoints": found}
        return self.plan | record

    @property
    def settings(self) -> Json:
        """`threshold` and `mean_loss` of the classes, where they were made already."""
        path = self.folder / "classes.json"
        found = read_json(path) if path.exists() else {}
        return {name: found[name] for name in ("threshold", "mean_loss") if found}

    def losses(self, checkpoints: Sequence[Checkpoint] | None = None) -> "LossColumns":
        """Of these checkpoints; None: of all that are there now."""
        chosen = self.checkpoints if checkpoints is None else checkpoints
        return LossColumns([self.path(c.tokens_seen) for c in chosen], self.tokens.num_targets)

    def forget_after(self, tokens_seen: int) -> None:
        """Of a run that goes on from an earlier checkpoint: what came later is made again."""
        for checkpoint in self.checkpoints:
            if checkpoint.tokens_seen > tokens_seen:
                self.path(checkpoint.tokens_seen, ".json").unlink()
                self.path(checkpoint.tokens_seen).unlink(missing_ok=True)
        self.write_manifest()

    def write_classes(
        self, found: Trajectories, rows: list[Json], threshold: float, mean_loss: float | None
    ) -> None:
        """One record a token, the fields of `Trajectories`, a table, and what made them, last."""
        (self.folder / "classes.json").unlink(missing_ok=True)
        dtype = [(name, column.dtype) for name, column in found._asdict().items()]
        table = np.empty(len(found.label), dtype)
        for name, column in found._asdict().items():
            table[name] = column
        hashes = {"trajectories.npy": write_array(self.folder / "trajectories.npy", table)}
        write_csv(self.folder / "classes.csv", rows)
        hashes["classes.csv"] = hash_file(self.folder / "classes.csv")
        settings = {"threshold": threshold, "mean_loss": mean_loss}
        write_record(self.folder / "classes.json", settings | {"sha256": hashes})


class LossColumns(Sequence[np.ndarray]):
    """(M,) float32 of each checkpoint, in the order of training.

    A file is mapped when it is asked for and for as long as it is used: a thousand at once would
    fill the memory with pages that were read.
    """

    def __init__(self, paths: Sequence[Path], num_targets: int):
        self.paths, self.num_targets = paths, num_targets

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LossColumns(self.paths[index], self.num_targets)
        return map_array(self.paths[index], "float32", self.num_targets)


def read_plan(folder: Path) -> Json:
    for name in ("plan.json", "token_set.json"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} holds no token losses ({name} is missing): see `slm dynamics`"
            )
    plan = read_json(folder / "plan.json")
    if plan.get("kind") != KIND:
        raise UserError(f"{folder}/plan.json: kind is {plan.get('kind')!r}, expected {KIND!r}")
    check_fields(folder / "plan.json", plan, {"sources": list_of(TEXT), "run": OBJECT})
    check_fields(folder / "plan.json", plan["run"], RUN)
    return plan
