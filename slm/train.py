"""Train a causal language model on selected tokens: `slm train` (see `slm train --help`).

One trainer for the reference model (selection=all on curated text), the controls (all, random) and
the target model (excess). The run's folder holds

    run.json        what the run is made of; another run is refused in the same folder
    checkpoints/    see checkpoint.py
    train.csv, heldout.csv, wandb/
    model/          the result as a Hugging Face folder, written when the run is complete
    lineage.json    what went in, what was counted
    tables.json     the hashes of the CSVs, written when the run is complete
    status.json     in a sweep: what became of the job
"""

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import distributed
from transformers import PreTrainedTokenizerFast

from slm.checkpoint import (
    Checkpoints,
    OnlyWriter,
    RandomStates,
    StopOnSignal,
    VerifiedCheckpointIO,
    newest_checkpoint,
)
from slm.claims import Claim, claim, owner_of, remove_temporaries
from slm.cli import command
from slm.data import Batch
from slm.errors import UserError
from slm.lineage import lineage, model_card, reference_record
from slm.model import SelectiveLM, check_saved, check_trainable
from slm.model_folder import check_model_folder, model_sha256, save_model
from slm.module import SelectiveModule
from slm.progress import Metrics, StepClock, progress_bar
from slm.rules import by_word, import_modules, trained_by_word
from slm.score import load_reference
from slm.selection import Selection
from slm.shards import References, hash_file, read_json, write_record
from slm.token_data import TokenData
from slm.tokenizer import load_corpus_tokenizer
from slm.tracking import WandbLog
from slm.train_keys import PRECISIONS, check_train

log = logging.getLogger("slm.train")
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
# Lightning greets, advises and repeats itself; its warnings still show.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
RANK_NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # Lightning's own order


def build(node: Any, **arguments: Any) -> Any:
    """Hydra's instantiate; what the node's class does not take or cannot make is one sentence."""
    try:
        built = instantiate(node, **arguments)
        if isinstance(built, partial):  # called later, in the middle of Lightning's set-up
            inspect.signature(built.func).bind_partial(*built.args, **built.keywords)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError | ValueError | MisconfigurationException):
            raise UserError(f"{node._target_}: {error.__cause__}") from None
        raise
    except TypeError as error:
        raise UserError(f"{node._target_}: {error}") from None
    return built


def run_identity(config: DictConfig, data: TokenData) -> dict[str, Any]:
    """What must not change when a run is continued; folders may move, so hashes stand for them."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    init_from = plain["model"].pop("init_from")
    if init_from is not None:
        del plain["model"]["architecture"]  # the folder's own counts
    loaded = None if init_from is None else init_identity("model.init_from", init_from)
    return {
        "seed": plain["seed"],
        "max_tokens": plain["max_tokens"],
        "corpus": data.corpus.fingerprint,
        "references": [store.fingerprint for store in data.references],
        "data.combine": plain["data"]["combine"],
        "online_reference": online_identity(config),
        "selection_start": plain["selection_start"],
        "init_from": loaded,
        "data.batch_size": plain["data"]["batch_size"],
        "data.micro_batch_size": plain["data"]["micro_batch_size"],
        "trainer.precision": config.trainer.precision,
        **flat("model", plain["model"]),
        **flat("selection", trained_by_word(plain["selection"])),
        **flat("optimizer", plain["optimizer"]),
    }


def flat(prefix: str, tree: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"prefix.a.b": 1}"""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(f"{prefix}.{key}", value).items()}


def online_identity(config: DictConfig) -> str | None:
    name = config.online_reference
    return None if name is None else init_identity("online_reference", name)


def init_identity(key: str, name: str) -> str:
    """Hash of a local folder; a hub name stands for itself."""
    if not Path(name).is_dir():
        return name
    check_model_folder(key, name)
    return model_sha256(name)


def adopt_run(folder: Path, identity: dict[str, Any], resume: str) -> Path | None:
    """Write run.json or compare with it; returns the checkpoint to continue from.

    A run that ended before its first checkpoint has nothing to lose and is replaced.
    """
    path = folder / "run.json"
    for place in (folder, folder / "checkpoints"):
        remove_temporaries(place)
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    others = names - {"run.claim", "status.json"}
    if others and not path.exists():
        raise UserError(
            f"{folder} holds {sorted(others)[0]} and no run (run.json): choose another `out`"
        )
    kept = any((folder / "checkpoints").glob("[!.]*.ckpt*")) or (folder / "model").exists()
    if not path.exists() or not kept:
        write_record(path, identity)
        return None
    before = by_word(read_json(path), "selection.")
    for field in [*identity, *sorted(before.keys() - identity.keys())]:
        if identity.get(field) != before.get(field):
            raise UserError(
                f"{folder} holds another run: {field} is {before.get(field)!r} in run.json, "
                f"{identity.get(field)!r} now; choose another `out`"
            )
    if resume == "never":
        raise UserError(f"{folder} holds this run already (run.json), and resume is 'never'")
    return newest_checkpoint(folder / "checkpoints", log.warning)


def check_config(config: DictConfig, data: TokenData, selection: Selection) -> None:
    check_references(config, data, selection.needs)
    if config.max_tokens < data.tokens_per_step:
        raise UserError(
            f"max_tokens ({config.max_tokens}) is less than one optimizer step "
            f"({data.tokens_per_step} tokens)"
        )
    start = config.selection_start
    if start >= config.max_tokens:
        raise UserError(
            f"selection_start is {start}, max_tokens {config.max_tokens}: the rule would never "
            "choose (selection=all trains on every token)"
        )
    warn_of_late_points(selection, config.max_tokens)
    for store in data.references:
        warn_of_other_precision(store, config.trainer.precision)
    best_of = config.callbacks.checkpoints.best_of
    if best_of is not None and best_of not in data.heldout:
        raise UserError(
            f"callbacks.checkpoints.best_of is {best_of!r}, data.heldout has {sorted(data.heldout)}"
        )


def warn_of_late_points(selection: Selection, max_tokens: int) -> None:
    for schedule in selection.schedules:
        last = schedule.points[-1][0]
        if last > max_tokens:
            log.warning(
                "the last point of a select_ratio schedule lies at %d tokens, the run ends at %d "
                "with a ratio of %.4g",
                *(last, max_tokens, schedule.at(max_tokens)),
            )


def check_references(config: DictConfig, data: TokenData, needs: tuple[str, ...]) -> None:
    """Missing scores never fall back to plain cross-entropy."""
    rule, online = config.selection._target_, config.online_reference
    if online is not None and data.references:
        raise UserError(
            f"online_reference is {online} and data.references {data.references[0].folder}: "
            "a batch has one score a token, give one of them"
        )
    if needs and not data.references and online is None:
        raise UserError(
            f"selection {rule} needs data.references (a folder made by `slm score`) or "
            "online_reference (a model folder), found null"
        )
    if "reference_entropy" in needs and online is None and not data.windows.has_entropy:
        raise UserError(
            f"selection {rule} needs one reference with entropies, found "
            f"{', '.join(str(store.folder) for store in data.references)} (make it with "
            "`slm score entropy=true`)"
        )


def warn_of_other_precision(references: References, precision: str) -> None:
    """Scores of another precision shift every excess loss a little; the paper does not say."""
    scored, training = references.manifest["scoring"]["dtype"], PRECISIONS[precision]
    if scored is None:  # by a server
        scored = "a precision that nobody knows"
    if scored != training:
        log.warning(
            "%s was scored in %s, training computes in %s", references.folder, scored, training
        )


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


def build_trainer(config: DictConfig, data: TokenData, check_owner: Callable[[], None]) -> Trainer:
    loggers = [build(node) for node in config.logger.values()]
    callbacks: list[Callback] = [build(node) for node in config.callbacks.values()]
    checkpoints = next(item for item in callbacks if isinstance(item, Checkpoints))
    # Saved last, so that a run that goes on from it lacks nothing that was made at its step.
    callbacks.sort(key=lambda item: isinstance(item, Checkpoints))
    clocks = [StepClock(item) for item in callbacks if isinstance(item, Metrics)]
    trainer: Trainer = build(
        config.trainer,
        accelerator=accelerator(config.trainer.accelerator),
        max_steps=round(config.max_tokens / data.tokens_per_step),
        max_epochs=-1,
        logger=loggers,
        callbacks=[
            *(OnlyWriter(check_owner), RandomStates(), *callbacks),
            *(StopOnSignal(checkpoints), progress_bar(), *clocks),
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
    config: DictConfig, data: TokenData, tokenizer: PreTrainedTokenizerFast
) -> SelectiveModule:
    init_from = config.model.init_from
    if init_from is not None and Path(init_from).is_dir():
        check_model_folder("model.init_from", init_from, config.data.check)
    lm: SelectiveLM = build(config.model, tokenizer=tokenizer, vocab_size=data.corpus.vocab_size)
    selection: Selection = build(config.selection)
    check_config(config, data, selection)
    check_trainable(lm, first_windows(data))
    return SelectiveModule(
        lm,
        selection,
        build(config.optimizer.adamw),
        build(config.optimizer.schedule),
        config.optimizer.gradient_clip,
        data.tokens_per_step,
        config.selection_start,
        load_online(config.online_reference, data, config.data.check),
    )


def first_windows(data: TokenData) -> Batch:
    return data.windows.batch(np.arange(min(2, len(data.windows))))


def load_online(folder: str | None, data: TokenData, check: str) -> SelectiveLM | None:
    if folder is None:
        return None
    check_model_folder("online_reference", folder)
    return load_reference(folder, data.corpus, "cpu", "float32", check)


def export(
    config: DictConfig,
    module: SelectiveModule,
    tokenizer: PreTrainedTokenizerFast,
    data: TokenData,
    identity: dict[str, Any],
) -> None:
    """Write model/ and lineage.json; their presence means that the run is complete."""
    trainer, folder = module.trainer, Path(config.run_dir)
    record = lineage(
        datamodule=data,
        selection=trained_by_word(OmegaConf.to_container(config.selection, resolve=True)),  # type: ignore[arg-type]
        needs_references=bool(module.selection.needs),
        online_reference=identity["online_reference"],
        seed=config.seed,
        init_from=config.model.init_from,
        init_from_sha256=identity["init_from"],
        tokens_seen=trainer.global_step * data.tokens_per_step,
        tokens_selected=module.tokens_selected,
        **training_cost(module),
        precision=config.trainer.precision,
        device=module.device,
    )
    results = {f"heldout/{name}/loss": loss for name, loss in module.heldout_losses.items()}
    tables = {path.name: hash_file(path) for path in sorted(folder.glob("*.csv"))}

    def complete(written: Path) -> None:
        check_saved(module.lm, first_windows(data), written)
        write_record(folder / "lineage.json", record)
        write_record(folder / "tables.json", {"kind": "tables", "sha256": tables})

    card = model_card(record, results)
    save_model(folder / "model", module.lm.model, tokenizer, card, record, complete)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLog):
            written = folder / "model" / "slm.json"
            logger.log_folder(written, name=f"model-{folder.name}", kind="model", is_input=False)


def check_overrides(config: DictConfig) -> None:
    """Refuse what would be read and not used; only a command line tells it from a default."""
    if config.model.init_from is None or not HydraConfig.initialized():
        return
    for word in HydraConfig.get().overrides.task:
        if word.lstrip("+~").startswith("model.architecture"):
            raise UserError(
                f"{word} is given with model.init_from={config.model.init_from}, which has an "
                "architecture of its own: leave one of them out"
            )


def check_complete(trainer: Trainer) -> None:
    """A callback, or whoever else may stop Lightning, makes no model of fewer tokens."""
    if trainer.global_step < trainer.max_steps:
        raise UserError(
            f"the run was ended at step {trainer.global_step} of {trainer.max_steps}, so no model "
            "is written; the same command goes on from its last checkpoint"
        )


def training_cost(module: SelectiveModule) -> dict[str, float | None]:
    """Absent where nobody measured it."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Metrics):
            flops = callback.flops(module.tokens_seen, module.tokens_trained)
            return {"train_seconds": callback.train_seconds, "train_flops": flops}
    return {"train_seconds": None, "train_flops": None}


def train(config: DictConfig) -> Path:
    """Run or continue one training; returns the model folder."""
    check_train(config)
    folder = Path(config.run_dir)
    seed_everything(config.seed, workers=True, verbose=False)
    import_modules(config.modules)
    check_overrides(config)
    data: TokenData = build(config.data)
    identity = run_identity(config, data)
    with ExitStack() as stack:
        start, check_owner = begin(stack, folder, identity, config.resume)
        if not was_launched() and is_over(start, folder):
            return folder / "model"
        tokenizer = load_corpus_tokenizer(data.corpus)
        module = build_module(config, data, tokenizer)
        trainer = build_trainer(config, data, check_owner)
        stack.callback(leave_process_group)
        start = tell(trainer, start)
        if is_over(start, folder):
            return folder / "model"
        words = "new run in %s" if start.checkpoint is None else "continuing %s"
        log.info(words, start.checkpoint or folder)
        try:
            log_inputs(trainer, config, data, module.lm.model.config.to_diff_dict())
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
            check_complete(trainer)
            if trainer.is_global_zero:
                check_owner()
                export(config, module, tokenizer, data, identity)
            trainer.strategy.barrier()
        finally:
            for logger in trainer.loggers:
                logger.finalize("finished")
    return folder / "model"


def leave_process_group() -> None:
    """A gloo group that is alive when the interpreter ends sometimes aborts the process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class Start(NamedTuple):
    """What rank 0 found in the run's folder. The others are told: each would look at another time,
    while rank 0 renames and removes."""

    checkpoint: Path | None = None
    is_complete: bool = False
    refusal: str | None = None


def begin(
    stack: ExitStack, folder: Path, identity: dict[str, Any], resume: str
) -> tuple[Start, Callable[[], None]]:
    """On rank 0: claim the folder until `stack` ends, and adopt it.

    Also what raises as soon as the folder is another process's.
    """
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]  # Lightning sets it on import
        return Start(), lambda: None
    try:
        check_owner = stack.enter_context(only_writer(folder)).check
        checkpoint = adopt_run(folder, identity, resume)
    except UserError as error:
        return Start(refusal=str(error)), lambda: None
    return Start(checkpoint, (folder / "model" / "slm.json").exists()), check_owner


def was_launched() -> bool:
    """Something else than this process starts the ranks, so there may be others by now."""
    return any(name in os.environ for name in RANK_NAMES)


def tell(trainer: Trainer, start: Start) -> Start:
    """Rank 0's `start`, on every rank; Lightning starts the ranks here where nobody has."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.launch(trainer.strategy.setup_environment)
    return trainer.strategy.broadcast(start)


def is_over(start: Start, folder: Path) -> bool:
    if start.refusal is not None:
        raise UserError(start.refusal)
    if start.is_complete:
        log.info("%s is complete already", folder)
    return start.is_complete


@contextmanager
def only_writer(folder: Path) -> Iterator[Claim]:
    """Refuse a folder that another live process trains in."""
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder / "run.claim") as mine:
        if mine is None:
            owner = owner_of(folder / "run.claim")
            raise UserError(f"another process trains in {folder} ({owner}, see run.claim)")
        yield mine


def log_inputs(
    trainer: Trainer, config: DictConfig, data: TokenData, model_config: dict[str, Any]
) -> None:
    """The configuration and what the references cost to every logger; to W&B's lineage, folders."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    if config.model.init_from is not None:
        plain["model"]["architecture"] = model_config
    plain["reference_records"] = [reference_record(store) for store in data.references]
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
        if isinstance(logger, WandbLog):
            for store in (data.corpus, *data.references):
                name = f"{store.KIND}-{store.fingerprint[:12]}"
                manifest = store.folder / "manifest.json"
                logger.log_folder(manifest, name=name, kind=store.KIND, is_input=True)


@command("train")
def main(config: DictConfig) -> None:
    folder = train(config)
    log.info("model: %s", folder)


if __name__ == "__main__":
    main()
