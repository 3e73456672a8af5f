"""Stages of one training: data, window length and rate change at a number of tokens.

    stages:
      - {name: pretrain, until_tokens: 9_000_000, data: {mixture: {...}}}
      - {name: long, until_tokens: 10_000_000, lr: 1e-4, data: {mixture: {...}}, seq_len: 512,
         model: {override: {rope_theta: 250000, max_position_embeddings: 512}}}

Each is a run of its own, in out/1-pretrain, out/2-long, that begins with the model of the one
before: its end is a model and a checkpoint, and the same command goes on in the stage that is not
complete. `schedule` says what becomes of the learning rate:

    restart  (what null is) the stage has a warm-up and an end of its own, and a new optimizer
    through  the schedule of the stage before goes on over this one, with its optimizer's states

Counts of tokens in a stage's settings (a select_ratio schedule) begin with the stage.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table as Printed

from slm.checks import Table, check, optional, real, section, text, whole, word
from slm.errors import UserError
from slm.model.architecture import check_length, positions_of
from slm.store.files import Json, write_record
from slm.train.build import accelerator, build, is_sharded, is_srun, is_torchrun, ranks
from slm.train.continued import Continued
from slm.train.curves import Run, final_losses
from slm.train.data import TokenData
from slm.train.fit import fit
from slm.train.keys import check_train
from slm.train.settings import check_scored

log = logging.getLogger("slm.train")
LAID = ("data", "model", "selection", "optimizer")  # groups of which a stage may change fields
STAGE: Table = {
    "name": text,
    "until_tokens": whole(1),
    "schedule": optional(word("restart", "through")),
    "lr": optional(real(0)),
    "seq_len": optional(whole(1)),
    **dict.fromkeys(LAID, section),
}


class Stage(NamedTuple):
    """A run of the chain."""

    name: str
    settings: Json  # of the run
    continued: Continued | None  # its part of a schedule that goes on over several
    tokens: tuple[int, int]  # from, until
    steps: int
    windows: dict[str, int]  # targets in one of each held-out set


def run_stages(settings: Json) -> Run:
    """All of them, one after the other; those that are complete are passed over.

    Raises:
        UserError: one cannot be run as it is, said before the first begins
    """
    check_ranks(settings["trainer"])
    stages = plan(settings)
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it on import
    for number, stage in enumerate(stages, 1):
        if is_first:
            log.info(
                "stage %d of %d, %s: tokens %s to %s",
                *(number, len(stages), stage.name, f"{stage.tokens[0]:,}", f"{stage.tokens[1]:,}"),
            )
        fit(stage.settings, stage.continued)
    if is_first:
        report(Path(settings["run_dir"]), stages)
    return Run(Path(stages[-1].settings["run_dir"]))


def check_ranks(trainer: Json) -> None:
    """Lightning would start its ranks anew for every stage."""
    if is_torchrun() or is_srun():
        return
    wanted = ranks(trainer)["devices"]
    on_gpus = accelerator(trainer["accelerator"]) != "cpu"
    count = torch.cuda.device_count() if wanted in ("auto", -1, "-1") and on_gpus else wanted
    if count not in (0, 1, "1", "auto", [0]):
        raise UserError(
            f"trainer.devices is {wanted!r}, which are {count} here, and stages run on several "
            "where torchrun or srun starts the ranks: torchrun --nproc-per-node=... -m slm.train"
        )


def plan(settings: Json) -> list[Stage]:
    """The runs, checked against their data."""
    rows = settings["stages"]
    check_rows(rows)
    if rows[-1]["until_tokens"] != settings["max_tokens"]:
        raise UserError(
            f"max_tokens is {settings['max_tokens']}, and the last of the stages "
            f"({rows[-1]['name']}) ends at {rows[-1]['until_tokens']}: both are the whole run's"
        )
    made: list[Stage] = []
    limit = positions_of(settings["model"]["init_from"], settings["model"]["architecture"])
    for number, row in enumerate(rows):
        before = made[-1] if made else None
        own = stage_settings(settings, row, number, before)
        check_train(own)
        limit, data = check_stage(row, own, limit)
        tokens = (before.tokens[1] if before else 0, row["until_tokens"])
        steps = round(own["max_tokens"] / data.tokens_per_step)
        windows = {name: corpus.seq_len for name, corpus in data.heldout.items()}
        made.append(Stage(row["name"], own, None, tokens, steps, windows))
    return with_schedules(rows, made)


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """What can be said of the list alone."""
    until, names = 0, set()
    for number, row in enumerate(rows):
        at = f"stages[{number}]"
        check({at: row}, {f"{at}.{key}": kind for key, kind in STAGE.items()})
        for key in ("name", "until_tokens"):
            if key not in row:
                raise UserError(f"{at} has no {key}")
        if "/" in row["name"] or row["name"] in names:
            raise UserError(f"{at}.name is {row['name']!r}: names are different, and have no /")
        if row["until_tokens"] <= until:
            raise UserError(
                f"{at} ({row['name']}) ends at until_tokens={row['until_tokens']}, before it "
                f"begins: the stage before ends at {until}"
            )
        if number == 0 and "schedule" in row and row["schedule"] == "through":
            raise UserError(f"{at}.schedule is 'through', and there is no stage before it")
        until = row["until_tokens"]
        names.add(row["name"])


def stage_settings(
    settings: Json, row: Mapping[str, Any], number: int, before: Stage | None
) -> Json:
    """Those of a run, from what all stages have and what this one changes."""
    own = copy.deepcopy({key: value for key, value in settings.items() if key != "stages"})
    own["stages"] = None
    start = before.tokens[1] if before else 0
    folder = str(Path(settings["run_dir"]) / f"{number + 1}-{row['name']}")
    own |= {"out": folder, "run_dir": folder, "max_tokens": row["until_tokens"] - start}
    own["callbacks"] = moved(own["callbacks"], settings["run_dir"], folder)
    own["logger"] = moved(own["logger"], settings["run_dir"], folder)
    own["selection_start"] = max(0, settings["selection_start"] - start)
    if before is not None:
        own["model"] |= {"init_from": before.settings["run_dir"] + "/model", "architecture": None}
        own["model"]["override"] = None
        own["data"]["seed"] = settings["data"]["seed"] + number  # else the same windows once more
    if "data" in row and not {"corpus", "mixture"}.isdisjoint(row["data"]):
        own["data"] |= {"corpus": None, "references": None, "mixture": None}
    for group in LAID:
        if group in row:
            own[group] = laid_over(own[group], row[group])
    if "lr" in row and row["lr"] is not None:
        own["optimizer"]["adamw"]["lr"] = row["lr"]
    return own


def moved(group: Any, old: str, new: str) -> Any:
    """Folders in the run's folder are in the stage's."""
    if isinstance(group, Mapping):
        return {key: moved(value, old, new) for key, value in group.items()}
    return group.replace(old, new, 1) if isinstance(group, str) and group.startswith(old) else group


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Json:
    made = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and key in made and isinstance(made[key], Mapping)
        made[key] = laid_over(made[key], value) if nested and key != "mixture" else value
    return made


def check_stage(
    row: Mapping[str, Any], own: Json, limit: int | None
) -> tuple[int | None, TokenData]:
    """Its data are there and fit it; returns its model's positions and them."""
    data: TokenData = build("data", own["data"])
    check_scored(own["max_tokens"], data)
    name, length = row["name"], data.corpus.seq_len
    if "seq_len" in row and row["seq_len"] not in (None, length):
        raise UserError(
            f"stage {name} has seq_len {row['seq_len']}, and {data.corpus.folder} was prepared "
            f"with {length}: `slm prepare seq_len={row['seq_len']}`"
        )
    override = own["model"]["override"] or {}
    if "max_position_embeddings" in override:
        limit = override["max_position_embeddings"]
    for what, corpus in ({"data": data.corpus} | data.heldout).items():
        remedy = "model: {{override: {override}}} in the stage has as many"
        check_length(limit, corpus.seq_len, f"stage {name}: {what} {corpus.folder}", remedy)
    if own["max_tokens"] < data.tokens_per_step:
        raise UserError(
            f"stage {name} has {own['max_tokens']} tokens, less than one optimizer step "
            f"({data.tokens_per_step})"
        )
    return limit, data


def with_schedules(rows: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> list[Stage]:
    """A schedule that goes through spans the stage before and all that follow with it."""
    through = ["schedule" in row and row["schedule"] == "through" for row in rows]
    made: list[Stage] = []
    for number, stage in enumerate(stages):
        first = number
        while through[first]:
            first -= 1
        last = number
        while last + 1 < len(stages) and through[last + 1]:
            last += 1
        if first == last:
            made.append(stage)
            continue
        if is_sharded(stage.settings["trainer"]["strategy"]):
            raise UserError(
                f"stage {stage.name}: schedule=through takes over the optimizer's states, which "
                "trainer=fsdp holds in shards: schedule=restart, or trainer=gpu"
            )
        steps = [one.steps for one in stages[first : last + 1]]
        folder = Path(stages[number - 1].settings["run_dir"]) if number > first else None
        part = Continued(folder, sum(steps[: number - first]), sum(steps))
        made.append(stage._replace(continued=part))
    return made


def report(out: Path, stages: Sequence[Stage]) -> None:
    """stages.json, and a table of what each ended with."""
    rows: list[Json] = []
    for stage in stages:
        folder = Path(stage.settings["run_dir"])
        rows.append(
            {
                "name": stage.name,
                "folder": folder.name,
                "from_tokens": stage.tokens[0],
                "until_tokens": stage.tokens[1],
                "lr": stage.settings["optimizer"]["adamw"]["lr"],
                "heldout": final_losses(folder),
                "heldout_seq_len": stage.windows,
            }
        )
    write_record(out / "stages.json", {"kind": "stages", "stages": rows})
    # A set's losses in windows of other lengths are no curve: a column each.
    lengths = [{(name, row["heldout_seq_len"][name]) for name in row["heldout"]} for row in rows]
    sets = sorted(set[tuple[str, int]]().union(*lengths))
    several = len({length for _, length in sets}) > 1
    heads = [f"{name}, windows of {length:,}" if several else name for name, length in sets]
    table = Printed("stage", "tokens", "peak rate", *heads)
    for row, mine in zip(rows, lengths, strict=True):
        losses = [f"{row['heldout'][one[0]]:.4f}" if one in mine else "" for one in sets]
        span = f"{row['from_tokens']:,} to {row['until_tokens']:,}"
        table.add_row(row["folder"], span, f"{row['lr']:g}", *losses)
    Console().print(table)
