"""A run is made longer: `max_tokens` raised on its folder, finished or not.

It goes on from its newest checkpoint up to which the longer run would have been the same: order,
rules and random states are functions of what was seen, and of the rest the schedule alone may look
at the run's end. A schedule that stays until its decay (optimizer=wsd) leaves all of it before the
decay; one that falls over the whole run (adamw's cosine) nothing.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from slm.errors import UserError
from slm.store.files import read_json, write_record
from slm.train.checkpoint import newest_checkpoint, remove_checkpoint, step_of

log = logging.getLogger("slm.train")
Schedule = Callable[[torch.optim.Optimizer, int], LRScheduler]


def factor(schedule: Schedule, num_steps: int) -> Callable[[int], float]:
    """Of a run of `num_steps`, the rate of each step against the peak."""
    made = schedule(torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0), num_steps)
    if not isinstance(made, LambdaLR):
        raise UserError(
            f"a run is made longer where its schedule is a LambdaLR, which says every step's rate; "
            f"this one is a {type(made).__name__}: choose another `out`"
        )
    return made.lr_lambdas[0]


def same_steps(schedule: Schedule, before: int, now: int) -> int:
    """Of a run of `before` steps, how many one of `now` steps begins with."""
    one, other = (factor(schedule, steps) for steps in (before, now))
    return next((step for step in range(before) if one(step) != other(step)), before)


def extend(
    folder: Path,
    identity: dict[str, Any],
    old_tokens: int,
    tokens_per_step: int,
    schedule: Schedule,
) -> Path:
    """Make the folder one of the longer run, unfinished; the checkpoint that it goes on from.

    run.json comes last: killed before, the run is made longer by the same command again.
    """
    before, now = (round(n / tokens_per_step) for n in (old_tokens, identity["max_tokens"]))
    same, name = same_steps(schedule, before, now), identity["optimizer.schedule.kind"]
    checkpoints = folder / "checkpoints"
    start = newest_checkpoint(checkpoints, log.warning, same) if same > 0 else None
    if start is None:
        raise UserError(
            f"{folder} cannot be made longer: max_tokens is {old_tokens} in run.json, "
            f"{identity['max_tokens']} now, and with the schedule {name} the longer run has the "
            f"same learning rates up to step {same} of {before} alone, where no checkpoint is "
            "left; choose another `out`, or train with a rate that stays (optimizer=wsd)"
        )
    log.info(
        "%s is made longer, from %s to %s tokens: as the longer run would have it up to step %d",
        *(folder, f"{old_tokens:,}", f"{identity['max_tokens']:,}", step_of(start)),
    )
    put_model_aside(folder)
    for path in sorted(checkpoints.glob("*-*.ckpt")):
        if step_of(path) > step_of(start):
            remove_checkpoint(path)
    write_record(folder / "run.json", identity)
    return start


def put_model_aside(folder: Path) -> None:
    """The model of fewer tokens stays, under a name that says how many."""
    if not (folder / "model" / "slm.json").exists():
        return
    seen = read_json(folder / "model" / "slm.json")["lineage"]["tokens_seen"]
    kept = folder / f"model-{seen}"
    if kept.exists():
        raise UserError(f"{kept} is in the way: the model of these tokens goes there")
    for name in ("lineage.json", "tables.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "model").rename(kept)
    log.info("its model of %s tokens is %s now", f"{seen:,}", kept)
