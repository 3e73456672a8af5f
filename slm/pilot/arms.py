"""The arms of a pilot: each a run of `slm.train` on the sample of its seed, from the same base.

    seed-0/sample/       the tokens that every arm of this seed trains on, in one order
    seed-0/references/   their scores
    seed-0/mixture/      as many tokens, the curated text in it at its share
    seed-0/excess_0.6/   a run; arm.json says that it is done, and what it cost

Checkpoints and model of a run that is done are removed: what a pilot measures is in tokens/, and
the models of all seeds would take more disk than the corpus.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from slm.pilot.losses import HeldoutSet, TokenLosses
from slm.pilot.verdict import MIXED, excess, random
from slm.selection.names import ALL_TOKENS
from slm.selection.rule import Selection
from slm.selection.rules import All, Excess, Random
from slm.store.files import Json, read_json, write_record
from slm.train.command import train
from slm.train.compose import read_choice

log = logging.getLogger("slm.pilot")
POINTS = (4, 8)  # measurements in a run, and one before it: as many as SHARE allows
SHARE = 0.25  # of a run's compute


class Arm(NamedTuple):
    name: str
    folder: str
    ratio: float | None = None
    is_mixed: bool = False

    def selection(self, seed: int) -> Selection:
        if self.ratio is None:
            return All()
        if self.name == random(self.ratio):
            return Random(select_ratio=self.ratio, seed=seed)
        return Excess(select_ratio=self.ratio)

    @property
    def needs_scores(self) -> bool:
        return self.ratio is not None and self.name == excess(self.ratio)


def arms_of(ratios: Sequence[float], has_mixed: bool) -> list[Arm]:
    found = [Arm(ALL_TOKENS, "all")]
    for k in ratios:
        found += [Arm(random(k), f"random_{k:g}", k), Arm(excess(k), f"excess_{k:g}", k)]
    return found + ([Arm(MIXED, "mixed", is_mixed=True)] if has_mixed else [])


class Work:
    """Seconds of trainings and forwards, and of the pilot's own work beside them; those of earlier
    processes are in a file, up to their last arm."""

    def __init__(self, path: Path) -> None:
        self.path, self.mark = path, time.perf_counter()
        self.clock = read_json(path) if path.exists() else {"work_seconds": 0.0, "own_seconds": 0.0}

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.add("own_seconds")
        try:
            yield
        finally:
            self.add("work_seconds")

    def add(self, name: str) -> None:
        now = time.perf_counter()
        self.clock[name] += now - self.mark
        self.mark = now

    def save(self) -> None:
        self.add("own_seconds")
        write_record(self.path, self.clock)

    def record(self) -> Json:
        self.save()
        work = self.clock["work_seconds"]
        return self.clock | {"overhead": self.clock["own_seconds"] / work if work else None}


class Training(NamedTuple):
    """What all arms share."""

    max_tokens: int
    tokens_per_step: int
    groups: Mapping[str, Any]  # model, data, optimizer, trainer
    heldout: Mapping[str, HeldoutSet]
    at_ends: Sequence[str]
    modules: Sequence[str]

    @property
    def every_tokens(self) -> int:
        """A training token costs three of a forward."""
        read = [one.live.size for name, one in self.heldout.items() if name not in self.at_ends]
        fitting = int(SHARE * 3 * self.max_tokens / sum(read))
        return max(self.tokens_per_step, self.max_tokens // min(max(fitting, POINTS[0]), POINTS[1]))

    def points(self) -> list[int]:
        """Tokens seen at each measurement, as `is_due` of the callbacks has them."""
        step, every = self.tokens_per_step, self.every_tokens
        seen = range(step, self.max_tokens + 1, step)
        due = [s for s in seen if s // every > (s - step) // every or s == self.max_tokens]
        return [0, *due]


def train_arm(arm: Arm, seed: int, place: Path, shared: Training, work: Work) -> Json:
    """Its record; one that is done is read."""
    run = place / arm.folder
    if not (run / "arm.json").exists():
        with work.counted():
            trained = train(
                place / ("mixture" if arm.is_mixed else "sample"),
                run,
                shared.max_tokens,
                references=place / "references" if arm.needs_scores else None,
                heldout={name: one.corpus.folder for name, one in shared.heldout.items()},
                selection=arm.selection(seed),
                callbacks=callbacks(run, shared),
                logger="csv",
                seed=seed,
                modules=shared.modules,
                **shared.groups,
            )
        record = trained.lineage
        kept = {name: record[name] for name in COUNTED}
        write_record(run / "arm.json", kept | {"kept": trained.kept_by_source})
        for name in ("checkpoints", "model"):
            shutil.rmtree(run / name)
    return read_json(run / "arm.json")


COUNTED = ("tokens_seen", "tokens_selected", "train_seconds", "train_flops", "device")


def callbacks(run: Path, shared: Training) -> dict[str, Any]:
    """The usual ones; without mask_overlap, whose evaluations nobody asks for here."""
    usual = read_choice("callbacks", "default")
    del usual["mask_overlap"]
    usual["metrics"]["every_steps"] = 1
    usual["checkpoints"] |= {"every_tokens": max(1, shared.max_tokens // 2), "keep": 1}
    batch = shared.groups["data"]["micro_batch_size"]
    mine = TokenLosses(
        shared.heldout,
        shared.at_ends,
        run_dir=str(run),
        every_tokens=shared.every_tokens,
        batch_size=batch,
    )
    return {"defaults": [], **usual, "heldout": mine}
