"""What a run computes with, from its settings: the model and its rule, the trainer."""

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from transformers import PreTrainedTokenizerFast

from slm.checks import anything, check_known
from slm.errors import UserError, said_once
from slm.model.architecture import add_row, check_length
from slm.model.build import SelectiveLM, check_model, check_trainable, load_model
from slm.model.sharded import deal_out, fill_from, refused_together, weights_in, without_weights
from slm.score.command import load_reference
from slm.selection.rule import Selection
from slm.store.claims import Owner
from slm.store.files import Json
from slm.store.hub import check_model_folder
from slm.store.windows import Batch, to_device
from slm.train.callbacks.base import StepProgress
from slm.train.callbacks.checkpoints import Checkpoints, OnlyWriter, RandomStates, StopOnSignal
from slm.train.callbacks.costs import TIMED_TOKENS, Costs
from slm.train.callbacks.metrics import Metrics, StepClock
from slm.train.checkpoint import VerifiedCheckpointIO
from slm.train.data import TokenData
from slm.train.module import SelectiveModule
from slm.train.settings import check_config
from slm.train.sharded import Sharded, data_ranks


def build(key: str, node: Any, **arguments: Any) -> Any:
    """Hydra's instantiate; what the node's class does not take or cannot make is one sentence.

    `key` is where the node stands in the settings.
    """
    if "_target_" not in node:
        raise UserError(f"{key} has no _target_, which names the class that it is made of")
    try:
        built = instantiate(node, **arguments)
        if isinstance(built, partial):  # called later, in the middle of Lightning's set-up
            inspect.signature(built.func).bind_partial(*built.args, **built.keywords)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError | ValueError | MisconfigurationException):
            check_taken(key, node)
            raise UserError(f"{named(key, node)}: {error.__cause__}") from None
        raise
    except TypeError as error:
        check_taken(key, node)
        raise UserError(f"{named(key, node)}: {error}") from None
    return built


def named(key: str, node: Mapping[str, Any]) -> str:
    """With the class, where it is not one of ours: those a user knows by the key alone."""
    target = node["_target_"]
    return key if target.startswith("slm.") else f"{key} ({target})"


def check_taken(key: str, node: Mapping[str, Any]) -> None:
    """A key of the node that its class does not take is refused by its name."""
    parameters = inspect.signature(get_object(node["_target_"])).parameters.values()
    table = {f"{key}.{parameter.name}": anything for parameter in parameters}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for name in node.keys() - {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}:
            check_known(f"{key}.{name}", table, {})


def built(group: str, nodes: Mapping[str, Any]) -> list[Any]:
    """Callbacks or loggers; Python may give the objects themselves."""
    return [
        build(f"{group}.{name}", node) if isinstance(node, Mapping) else node
        for name, node in nodes.items()
    ]


def strategy(wanted: Any) -> Any:
    """Every rank trains on windows of its own and starts as a process of its own."""
    made = build("trainer.strategy", wanted) if isinstance(wanted, Mapping) else wanted
    is_ddp = type(made) is DDPStrategy and made._start_method == "popen"
    if type(made) is ModelParallelStrategy:
        raise UserError(
            "trainer.strategy makes a ModelParallelStrategy, which shares every layer out over the "
            "ranks of a machine (tensor parallelism), while each of them trains on windows of its "
            "own: trainer=fsdp is FSDP2 over all ranks"
        )
    if isinstance(made, Strategy) and not (is_ddp or type(made) is Sharded):
        raise UserError(
            f"trainer.strategy makes a {type(made).__name__}, it must be a DDPStrategy that starts "
            "its processes by itself (start_method=popen), or, for FSDP2, what trainer=fsdp says"
        )
    return made


def is_sharded(wanted: Any) -> bool:
    """Before there is a trainer."""
    return isinstance(wanted, Mapping) and get_object(wanted["_target_"]) is Sharded


def accelerator(wanted: Any) -> Any:
    """auto as for `device` elsewhere: Lightning would take Apple's mps first."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator is {wanted!r}, and PyTorch finds no CUDA device here")
    return wanted


def check_device(device: torch.device) -> None:
    if device.type == "mps":
        raise UserError(
            "trainer.accelerator chooses mps, which has no float64, and losses are summed in it: "
            "trainer.accelerator=cpu"
        )


def build_trainer(settings: Json, data: TokenData, owner: Owner) -> Trainer:
    loggers = built("logger", settings["logger"])
    callbacks: list[Callback] = built("callbacks", settings["callbacks"])
    checkpoints = next(item for item in callbacks if isinstance(item, Checkpoints))
    # Saved last, so that a run that goes on from it lacks nothing that was made at its step.
    callbacks.sort(key=lambda item: isinstance(item, Checkpoints))
    clocks = [StepClock(item) for item in callbacks if isinstance(item, Metrics)]
    trainer: Trainer = build(
        "trainer",
        settings["trainer"],
        **ranks(settings["trainer"]),
        accelerator=accelerator(settings["trainer"]["accelerator"]),
        strategy=strategy(settings["trainer"]["strategy"]),
        max_steps=round(settings["max_tokens"] / data.tokens_per_step),
        max_epochs=-1,
        logger=loggers,
        callbacks=[
            *(
                OnlyWriter(owner),
                RandomStates(settings["seed"]),
                Costs(timed_windows(data)),
                *callbacks,
            ),
            *(StopOnSignal(checkpoints), StepProgress(), *clocks),
        ],
        plugins=[VerifiedCheckpointIO(owner), *slurm()],
        enable_checkpointing=False,  # Checkpoints saves, and it alone
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    check_device(trainer.strategy.root_device)
    with said_once(trainer.global_rank):
        trainer.accumulate_grad_batches = data.accumulate(data_ranks(trainer).count)
    return trainer


def is_torchrun() -> bool:
    return TorchElasticEnvironment.detect()


def is_srun() -> bool:
    is_job = "SLURM_NTASKS" in os.environ  # elsewhere detect() warns of an srun that is not used
    return is_job and SLURMEnvironment.detect() and not is_torchrun()


def slurm() -> list[SLURMEnvironment]:
    """Where Lightning would choose it; its own handler of a time limit saves in the current folder
    a checkpoint that every later run there would load in place of its own."""
    return [SLURMEnvironment(auto_requeue=False)] if is_srun() else []


def ranks(trainer: Json) -> Json:
    """devices and num_nodes; `auto` is what torchrun or srun started, which an elastic torchrun
    changes while the run goes on."""
    wanted = {name: trainer[name] for name in ("devices", "num_nodes")}
    there: Json = {"devices": "auto", "num_nodes": 1}
    if is_torchrun():
        local, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        there = {"devices": local, "num_nodes": world // local}
    elif is_srun():
        nodes, world = (int(os.environ[name]) for name in ("SLURM_NNODES", "SLURM_NTASKS"))
        there = {"devices": world // nodes, "num_nodes": nodes}
    return {name: there[name] if value == "auto" else value for name, value in wanted.items()}


def build_module(
    settings: Json, data: TokenData, tokenizer: PreTrainedTokenizerFast
) -> SelectiveModule:
    init_from = settings["model"]["init_from"]
    if init_from is not None and Path(init_from).exists():
        check_model_folder("model.init_from", init_from, settings["data"]["check"])
    more = {"tokenizer": tokenizer, "vocab_size": data.corpus.vocab_size}
    make = partial(build, "model", settings["model"], **more)
    sharded = is_sharded(settings["trainer"]["strategy"])
    with without_weights() if sharded else nullcontext():
        lm: SelectiveLM = make()
        online = load_online(settings["online_reference"], data, settings["data"]["check"])
    selection: Selection = build("selection", settings["selection"])
    check_config(settings, data, selection)
    check_length(lm.model.config, data.corpus.seq_len)
    for name, held in data.heldout.items():
        check_length(lm.model.config, held.seq_len, f"held-out set {name}: {held.folder}")
    added_id = data.corpus.vocab_size
    if selection.replaces:
        check_not_sharded(settings["trainer"]["strategy"])
        add_row(lm.model, added_id)
    if not sharded:
        check_trainable(lm, first_windows(data))
    return SelectiveModule(
        lm,
        selection,
        build("optimizer.adamw", settings["optimizer"]["adamw"]),
        build("optimizer.schedule", settings["optimizer"]["schedule"]),
        settings["optimizer"]["gradient_clip"],
        data.tokens_per_step,
        settings["selection_start"],
        online,
        fillers(make, settings, data) if sharded else (),
        added_id,
    )


def check_not_sharded(strategy: Any) -> None:
    if is_sharded(strategy):
        raise UserError(
            "selection.mode is 'replace', which adds a row to the embedding, and trainer=fsdp "
            "reads the model in shards: trainer=gpu has all of it on every rank"
        )


Filler = Callable[[SelectiveLM], None]


def fillers(make: Callable[[], SelectiveLM], settings: Json, data: TokenData) -> list[Filler]:
    """Of the model, and of the online reference where there is one."""
    batch, reference = first_windows(data), settings["online_reference"]
    mine = partial(fill, make, settings["model"]["init_from"], check_trainable, batch)
    load = partial(load_whole, reference)
    theirs = partial(fill, load, reference, check_model, batch)
    return [mine] if reference is None else [mine, theirs]


def load_whole(folder: str) -> SelectiveLM:
    return SelectiveLM(load_model(folder))


def fill(
    make: Callable[[], SelectiveLM],
    init_from: str | None,
    check: Callable[[SelectiveLM, Batch], None],
    batch: Batch,
    lm: SelectiveLM,
) -> None:
    """The weights of a model in shards, and the check that one process makes of a whole one.

    New ones are made on rank 0, as in one process.
    """
    is_first, folder = torch.distributed.get_rank() == 0, Path(init_from or "")
    with refused_together():
        files = weights_in(folder, lm) if init_from is not None and folder.is_dir() else None
        if files is not None:
            fill_from(files, lm)
        whole = make() if files is None and is_first else None
    if files is None:
        deal_out(lm, whole)
    with refused_together():
        check(lm, to_device(batch, lm.device))


def timed_windows(data: TokenData) -> Batch:
    """No more than a micro-batch, which is known to fit, and few tokens."""
    count = max(1, min(data.micro_batch_size, TIMED_TOKENS // data.corpus.seq_len))
    return data.windows.batch(data.windows.available[:count])


def first_windows(data: TokenData) -> Batch:
    return data.windows.batch(data.windows.available[:2])


def load_online(folder: str | None, data: TokenData, check: str) -> SelectiveLM | None:
    if folder is None:
        return None
    check_model_folder("online_reference", folder)
    return load_reference(folder, data.corpus, "cpu", "float32", check)
