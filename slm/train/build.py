"""What a run computes with, from its settings: the model and its rule, the trainer."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, Strategy
from transformers import PreTrainedTokenizerFast

from slm.checks import anything, check_known
from slm.errors import UserError
from slm.model.build import SelectiveLM, check_trainable
from slm.score.command import load_reference
from slm.selection.rule import Selection
from slm.store.files import Json
from slm.store.hub import check_model_folder
from slm.store.windows import Batch
from slm.train.callbacks.base import StepProgress
from slm.train.callbacks.checkpoints import Checkpoints, OnlyWriter, RandomStates, StopOnSignal
from slm.train.callbacks.costs import TIMED_TOKENS, Costs
from slm.train.callbacks.metrics import Metrics, StepClock
from slm.train.checkpoint import VerifiedCheckpointIO
from slm.train.data import TokenData
from slm.train.module import SelectiveModule
from slm.train.settings import check_config


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
            raise UserError(f"{node['_target_']}: {error.__cause__}") from None
        raise
    except TypeError as error:
        check_taken(key, node)
        raise UserError(f"{node['_target_']}: {error}") from None
    return built


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
    """Gradients' norms, held-out losses and checkpoints want the whole model in every process."""
    made = build("trainer.strategy", wanted) if isinstance(wanted, Mapping) else wanted
    is_ddp = type(made) is DDPStrategy and made._start_method == "popen"
    if isinstance(made, Strategy) and not is_ddp:
        raise UserError(
            f"trainer.strategy makes a {type(made).__name__}, it must be a DDPStrategy that starts "
            "its processes by itself (start_method=popen)"
        )
    return made


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


def build_trainer(settings: Json, data: TokenData, check_owner: Callable[[], None]) -> Trainer:
    loggers = built("logger", settings["logger"])
    callbacks: list[Callback] = built("callbacks", settings["callbacks"])
    checkpoints = next(item for item in callbacks if isinstance(item, Checkpoints))
    # Saved last, so that a run that goes on from it lacks nothing that was made at its step.
    callbacks.sort(key=lambda item: isinstance(item, Checkpoints))
    clocks = [StepClock(item) for item in callbacks if isinstance(item, Metrics)]
    trainer: Trainer = build(
        "trainer",
        settings["trainer"],
        accelerator=accelerator(settings["trainer"]["accelerator"]),
        strategy=strategy(settings["trainer"]["strategy"]),
        max_steps=round(settings["max_tokens"] / data.tokens_per_step),
        max_epochs=-1,
        logger=loggers,
        callbacks=[
            *(OnlyWriter(check_owner), RandomStates(), Costs(timed_windows(data)), *callbacks),
            *(StopOnSignal(checkpoints), StepProgress(), *clocks),
        ],
        plugins=[VerifiedCheckpointIO(check_owner)],
        enable_checkpointing=False,  # Checkpoints saves, and it alone
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    check_device(trainer.strategy.root_device)
    trainer.accumulate_grad_batches = data.accumulate(trainer.world_size)
    return trainer


def build_module(
    settings: Json, data: TokenData, tokenizer: PreTrainedTokenizerFast
) -> SelectiveModule:
    init_from = settings["model"]["init_from"]
    if init_from is not None and Path(init_from).exists():
        check_model_folder("model.init_from", init_from, settings["data"]["check"])
    lm: SelectiveLM = build(
        "model", settings["model"], tokenizer=tokenizer, vocab_size=data.corpus.vocab_size
    )
    selection: Selection = build("selection", settings["selection"])
    check_config(settings, data, selection)
    check_trainable(lm, first_windows(data))
    return SelectiveModule(
        lm,
        selection,
        build("optimizer.adamw", settings["optimizer"]["adamw"]),
        build("optimizer.schedule", settings["optimizer"]["schedule"]),
        settings["optimizer"]["gradient_clip"],
        data.tokens_per_step,
        settings["selection_start"],
        load_online(settings["online_reference"], data, settings["data"]["check"]),
    )


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
