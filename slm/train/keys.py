"""The keys of `slm train`, and those of Lightning's trainer that a run may have.

What is built from a `_target_` has its constructor's keys; here are those that have a range.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slm.checks import (
    CHECKS,
    Kind,
    Table,
    anything,
    check,
    check_known,
    each,
    either,
    flag,
    folders,
    number,
    optional,
    real,
    section,
    sections,
    seed,
    select,
    several,
    text,
    texts,
    whole,
    word,
)
from slm.command_keys import PRECISIONS
from slm.errors import UserError, shown
from slm.store.inputs import check_inputs

FROM_ENVIRONMENT = "PL_TRAINER_"  # Lightning takes arguments that were not given from there
EIGHT_BITS = "slm.train.optim8bit.adamw8bit"
count, count_or_null = whole(1), optional(whole(1))
# None of those that fork or spawn; trainer=fsdp has the one that shards.
STRATEGIES = ("auto", "single_device", "ddp")
STRATEGIES += ("ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")

# The rest of Lightning's arguments are set by us, or would train on other or fewer tokens than the
# run's records say.
TRAINER: Table = {
    "trainer._target_": anything,
    "trainer.accelerator": word("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.devices": anything,
    "trainer.num_nodes": either(count, word("auto")),
    "trainer.strategy": either(word(*STRATEGIES), section),
    "trainer.strategy.cpu_offload": flag,
    "trainer.strategy.reshard_after_forward": flag,
    "trainer.strategy.async_checkpoints": flag,
    "trainer.strategy.tensor_parallel_size": count,
    "trainer.precision": word(*PRECISIONS),
    "trainer.deterministic": optional(either(flag, word("warn"))),
    "trainer.benchmark": optional(flag),
    "trainer.detect_anomaly": flag,
    "trainer.profiler": anything,
    "trainer.sync_batchnorm": flag,
    "trainer.default_root_dir": optional(text),
}
TRAIN: Table = TRAINER | {
    "out": text,
    "run_dir": text,
    "max_tokens": count,
    "selection_start": whole(0),
    "online_reference": optional(text),
    "stages": optional(several(section)),
    "seed": seed,
    "resume": word("auto", "never"),
    "modules": several(text, least=0),
    "data": section,
    "data.corpus": optional(text),
    "data.mixture": optional(sections),
    "data.references": optional(either(texts, folders)),
    "data.heldout": optional(either(folders, Kind("{}", lambda v: v == {}))),
    "data.check": word(*CHECKS),
    "data.heldout_windows": count,
    "data.batch_size": count,
    "data.micro_batch_size": count,
    "data.num_workers": whole(0),
    "data.seed": seed,
    "data.order": optional(word("keyed", "permutation")),
    "model": section,
    "model.architecture": optional(section),
    "model.init_from": optional(text),
    "model.attn_implementation": optional(text),
    "model.activation_checkpointing": flag,
    "model.compile": flag,
    "model.logits_cache_bytes": whole(0),
    "model.backward": word("exact", "selected"),
    "model.keys_cache_bytes": whole(0),
    "model.override": optional(section),
    "selection": section,
    # A schedule has its own check; null: the rule's bound says what is kept.
    "selection.select_ratio": optional(either(real(0, 1, "(]"), section)),
    "optimizer.adamw": section,
    "optimizer.adamw.lr": real(0),
    "optimizer.adamw.betas": each(real(0, 1, "[)"), 2),
    "optimizer.adamw.eps": real(0),
    "optimizer.adamw.weight_decay": real(0),
    "optimizer.adamw.foreach": optional(flag),
    "optimizer.adamw.fused": optional(flag),
    "optimizer.schedule": section,
    "optimizer.schedule.warmup_fraction": real(0, 1),
    "optimizer.schedule.warmup_steps": whole(0),
    "optimizer.schedule.decay_fraction": real(0, 1),
    "optimizer.schedule.final_fraction": real(0, 1),
    "optimizer.gradient_clip": optional(real(0, ends="()")),
    "callbacks": sections,
    "callbacks.metrics.every_steps": count,
    "callbacks.heldout.every_tokens": count_or_null,
    "callbacks.heldout.batch_size": count,
    "callbacks.mask_overlap.num_windows": count,
    "callbacks.mask_overlap.every_tokens": count_or_null,
    "callbacks.checkpoints.every_tokens": count_or_null,
    "callbacks.checkpoints.keep": count_or_null,
    "callbacks.dynamics.num_targets": count,
    "callbacks.dynamics.seed": seed,
    "callbacks.dynamics.by_source": flag,
    "callbacks.dynamics.every_tokens": count_or_null,
    "callbacks.dynamics.batch_size": count,
    "callbacks.dynamics.threshold": real(0),
    "callbacks.dynamics.mean_loss": optional(number),
    "logger": sections,
}
FOLDERS = (
    "corpus",
    "references",
    "heldout",
    "mixture",
)  # of data: in Python, arguments of their own
ARGUMENTS: Table = dict.fromkeys(
    {key.split(".")[0] for key in TRAIN} - {"run_dir"} | {*FOLDERS}, anything
)
LEAST_SHARE = 1e-5  # else a block of the order (order.py) has too many windows
NEEDED_OF_PART: Table = {"corpus": text, "share": real(0, 1, "(]")}
PART = NEEDED_OF_PART | {"references": optional(text), "max_epochs": optional(real(0, ends="()"))}
LENGTH = "max_tokens alone says how long a run is"
INSTEAD = {
    **dict.fromkeys(
        [f"trainer.{name}" for name in ("max_steps", "max_epochs", "max_time", "min_steps")], LENGTH
    ),
    **dict.fromkeys(
        [f"trainer.{name}" for name in ("limit_train_batches", "overfit_batches", "fast_dev_run")],
        "which would end the run early or repeat its batches: a run trains on max_tokens tokens "
        "(experiment=smoke is a short one)",
    ),
    "trainer.accumulate_grad_batches": "data.batch_size and data.micro_batch_size give it",
    "trainer.gradient_clip_val": "optimizer.gradient_clip does its work",
}


def check_train(settings: dict[str, Any]) -> None:
    strategy = select(settings, "trainer.strategy")
    if isinstance(strategy, str) and strategy.startswith("fsdp"):
        raise UserError(
            f"trainer.strategy is {strategy!r}, which is FSDP1: trainer=fsdp shards with FSDP2"
        )
    check(settings, TRAIN, INSTEAD)
    if settings["stages"] is None:  # else each stage may have its own
        check_corpus(settings["data"])
    if all(select(settings, f"optimizer.adamw.{name}") is True for name in ("foreach", "fused")):
        raise UserError("optimizer.adamw.foreach and fused are both true: one of them at most")
    made = select(settings, "optimizer.adamw._target_")
    if made == EIGHT_BITS and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer=adamw8bit needs bitsandbytes, which is not installed here: "
            "pip install 'slm-trainer[adamw8bit]'"
        )
    for name, key in trainer_environment():
        check_known(key, TRAINER, {key: f"as {name} in the environment, where nothing may set it"})


def check_corpus(data: Any) -> None:
    """One corpus, or several as a mixture."""
    given = {name: data[name] for name in FOLDERS if name in data and data[name] is not None}
    if "mixture" in given:
        check_mixture(given["mixture"])
        for name in ("corpus", "references"):
            if name in given:
                raise UserError(
                    f"data.{name} is {shown(given[name])}, and each part of data.mixture has its "
                    "own: give one of them"
                )
    elif "corpus" not in given:
        raise UserError(
            "data.corpus must be given: a folder made by `slm prepare` (or data.mixture, several)"
        )


def part_key(name: str) -> str:
    return f"data.mixture.{name}"


def check_mixture(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """What can be said before anything is opened."""
    if not parts:
        raise UserError("data.mixture names no part: {name: {corpus: folder, share: 1.0}, ...}")
    table = {f"{part_key(name)}.{field}": kind for name in parts for field, kind in PART.items()}
    check({"data": {"mixture": parts}}, table)
    for name, part in parts.items():
        for field in NEEDED_OF_PART.keys() - part.keys():
            raise UserError(f"{part_key(name)} has no {field}")
        if part["share"] < LEAST_SHARE:
            raise UserError(
                f"{part_key(name)}.share is {part['share']:g}, less than {LEAST_SHARE:g}: a window "
                f"in {1 / part['share']:,.0f} is read of it, leave it out"
            )
    total = math.fsum(part["share"] for part in parts.values())
    if abs(total - 1) > 1e-6:
        shares = ", ".join(f"{name} {part['share']:g}" for name, part in parts.items())
        raise UserError(f"the shares of data.mixture sum to {total:g}, not to 1: {shares}")
    without = [name for name, part in parts.items() if not field_of(part, "references")]
    if without and len(without) < len(parts):
        with_them = next(name for name in parts if name not in without)
        raise UserError(
            f"{part_key(with_them)} has references and {part_key(without[0])} has none: all parts "
            "have them or no part"
        )


def field_of(part: Mapping[str, Any], name: str) -> Any:
    return part[name] if name in part else None


def check_run(settings: dict[str, Any]) -> None:
    """Of the command: what can be said before PyTorch is imported."""
    check_train(settings)
    check_inputs(settings)
    from slm.store.shards import read_manifest  # NumPy, which a mistyped key need not wait for

    if settings["stages"] is not None:
        return
    data = settings["data"]
    folder = data["corpus"] or next(iter(data["mixture"].values()))["corpus"]
    seq_len = read_manifest(Path(folder), "corpus")["seq_len"]
    check_one_step(settings["max_tokens"], data["batch_size"] * seq_len)


def check_one_step(max_tokens: int, tokens_per_step: int) -> None:
    if max_tokens < tokens_per_step:
        raise UserError(
            f"max_tokens ({max_tokens}) is less than one optimizer step ({tokens_per_step} tokens)"
        )


def trainer_environment() -> Iterator[tuple[str, str]]:
    for name in sorted(os.environ):
        if name.startswith(FROM_ENVIRONMENT):
            yield name, f"trainer.{name.removeprefix(FROM_ENVIRONMENT).lower()}"
