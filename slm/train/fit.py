"""One training from its settings, begun or continued: what `slm train` does behind its door."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer, seed_everything
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from transformers import PreTrainedTokenizerFast

from slm.errors import UserError, said_once, shown
from slm.jobs import check_launcher
from slm.model.build import SelectiveLM, check_saved
from slm.model.folder import save_model
from slm.model.sharded import assembled, gathered, is_cut, together
from slm.selection.names import selection_name
from slm.selection.registry import import_modules, in_words
from slm.store.claims import Owner, Unclaimed
from slm.store.fields import of_what
from slm.store.files import Json, hash_file, nested, write_record
from slm.store.tokenizer import load_corpus_tokenizer
from slm.train.build import accelerator, build, build_module, build_trainer, first_windows
from slm.train.callbacks.metrics import Metrics
from slm.train.continued import Continued, TakesOver
from slm.train.curves import Run
from slm.train.data import TokenData
from slm.train.identity import adopt_order, adopt_run, only_writer, run_identity
from slm.train.lineage import lineage, model_card, reference_record
from slm.train.loggers import WandbLog
from slm.train.mixture import write_mixture
from slm.train.module import SelectiveModule
from slm.train.order import NEW
from slm.train.settings import check_scored

log = logging.getLogger("slm.train")
RANK_NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # Lightning's own order


def fit(settings: Json, continued: Continued | None = None) -> None:
    """Run or continue one training: its folder is complete afterwards.

    continued: its part of a longer schedule, as a stage (stages.py)
    """
    folder = Path(settings["run_dir"])
    check_launcher()
    accelerator(settings["trainer"]["accelerator"])  # before anything is read
    seed_everything(settings["seed"], workers=True, verbose=False)
    import_modules(settings["modules"])
    data: TokenData = build("data", settings["data"])
    adopt_order(folder, data)
    identity = run_identity(settings, data)
    if continued is not None:
        identity |= continued.identity()
    check_scored(settings["max_tokens"], data)  # before a folder is made one of a longer run
    with ExitStack() as stack:
        stack.enter_context(said_by_the_first())
        start, owner = begin(stack, folder, identity, settings, data.tokens_per_step)
        if not was_launched() and is_over(start, folder):
            return
        tokenizer = load_corpus_tokenizer(data.corpus)
        module = build_module(settings, data, tokenizer)
        trainer = build_trainer(settings, data, owner)
        if continued is not None:
            module.make_schedule = continued.schedule(module.make_schedule)
            if continued.run is not None:
                trainer.callbacks.append(TakesOver(continued.run))  # type: ignore[attr-defined]
        stack.callback(leave_process_group)
        start = tell(trainer, start)
        data.order = start.order
        if is_over(start, folder):
            return
        check_same_everywhere(trainer, identity)
        words = "new run in %s" if start.checkpoint is None else "continuing %s"
        if trainer.is_global_zero:
            log.info(words, start.checkpoint or folder)
        try:
            log_inputs(trainer, settings, data, module.lm.model.config.to_diff_dict())
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
            check_complete(trainer)
            name = selection_name(nested(identity, "selection."))
            check_trained(name, module.empty_steps, trainer.global_step)
            lm = whole_lm(module.lm)
            if lm is not None and trainer.is_global_zero:
                owner.check()
                export(settings, module, lm, tokenizer, data, identity)
            trainer.strategy.barrier()
        finally:
            for logger in trainer.loggers:
                logger.finalize("finished")


def export(
    settings: Json,
    module: SelectiveModule,
    lm: SelectiveLM,
    tokenizer: PreTrainedTokenizerFast,
    data: TokenData,
    identity: dict[str, Any],
) -> None:
    """Write model/ and lineage.json; their presence means that the run is complete."""
    trainer, folder = module.trainer, Path(settings["run_dir"])
    record = lineage(
        datamodule=data,
        selection=nested(identity, "selection."),
        needs_references=bool(module.selection.needs),
        online_reference=identity["online_reference"],
        seed=settings["seed"],
        init_from=settings["model"]["init_from"],
        init_from_sha256=identity["init_from"],
        tokens_seen=trainer.global_step * data.tokens_per_step,
        tokens_selected=module.tokens_selected,
        **training_cost(module),
        precision=settings["trainer"]["precision"],
        device=module.device,
    )
    if data.mixture is not None:
        windows = trainer.global_step * data.batch_size
        write_mixture(folder, data.mixture.rows(windows, data.seed, Run(folder).kept_by_source))
    results = {f"heldout/{name}/loss": loss for name, loss in module.heldout_losses.items()}
    tables = {path.name: hash_file(path) for path in sorted(folder.glob("*.csv"))}

    def complete(written: Path) -> None:
        check_saved(lm, first_windows(data), written)
        write_record(folder / "lineage.json", record)
        write_record(folder / "tables.json", {"kind": "tables", "sha256": tables})

    card = model_card(record, results)
    save_model(folder / "model", lm.model, tokenizer, card, record, complete)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLog):
            written = folder / "model" / "slm.json"
            logger.log_folder(written, name=f"model-{folder.name}", kind="model", is_input=False)


def whole_lm(lm: SelectiveLM) -> SelectiveLM | None:
    """Itself; of one in shards, which all ranks gather, one in rank 0's host memory."""
    if not is_cut(lm):
        return lm
    weights = gathered(lm)
    if weights is None:
        return None
    inner = {name.removeprefix("model."): value for name, value in weights.items()}
    return SelectiveLM(assembled(lm.model, inner))


def check_complete(trainer: Trainer) -> None:
    """A callback, or whoever else may stop Lightning, makes no model of fewer tokens."""
    if trainer.global_step < trainer.max_steps:
        raise UserError(
            f"the run was ended at step {trainer.global_step} of {trainer.max_steps}, so no model "
            "is written; the same command goes on from its last checkpoint"
        )


def check_trained(selection: str, empty: int, steps: int) -> None:
    """A bound may lie so that nothing passes it: in some steps, or in the whole run."""
    if empty == steps:
        raise UserError(
            f"selection {selection} kept no token in {steps} steps, so no model is written"
        )
    if empty and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        log.warning("selection %s kept no token in %d of %d steps", selection, empty, steps)


def training_cost(module: SelectiveModule) -> dict[str, float | None]:
    """Absent where nobody measured it."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Metrics):
            flops = callback.flops(module.tokens_seen, module.tokens_trained)
            return {"train_seconds": callback.train_seconds, "train_flops": flops}
    return {"train_seconds": None, "train_flops": None}


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
    order: str = NEW


def begin(
    stack: ExitStack, folder: Path, identity: dict[str, Any], settings: Json, tokens_per_step: int
) -> tuple[Start, Owner]:
    """On rank 0: claim the folder until `stack` ends, and adopt it.

    Also its owner, who raises as soon as the folder is another process's.
    """
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]  # Lightning sets it on import
        return Start(), Unclaimed()
    try:
        owner = stack.enter_context(only_writer(folder))
        schedule = build("optimizer.schedule", settings["optimizer"]["schedule"])
        checkpoint = adopt_run(folder, identity, settings["resume"], tokens_per_step, schedule)
    except UserError as error:
        return Start(refusal=str(error)), Unclaimed()
    is_complete = (folder / "model" / "slm.json").exists()
    return Start(checkpoint, is_complete, order=identity["data.order"]), owner


@contextmanager
def said_by_the_first() -> Iterator[None]:
    """What all ranks would say alike; what is wrong with one of them is said by that one."""
    own = [logging.getLogger(name) for name in ("slm", "slm_kernels")]
    levels = [logger.level for logger in own]
    for logger in own if rank_zero_only.rank != 0 else ():  # type: ignore[attr-defined]
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(own, levels, strict=True):
            logger.setLevel(level)


def was_launched() -> bool:
    """Something else than this process starts the ranks, so there may be others by now."""
    return any(name in os.environ for name in RANK_NAMES)


def tell(trainer: Trainer, start: Start) -> Start:
    """Rank 0's `start`, on every rank; Lightning starts the ranks here where nobody has."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.launch(trainer.strategy.setup_environment)
    return trainer.strategy.broadcast(start)


def check_same_everywhere(trainer: Trainer, identity: dict[str, Any]) -> None:
    """Another machine may have other files under the same names."""
    if trainer.world_size == 1:
        return
    (_, mine), *others = together((socket.gethostname(), identity))
    for rank, (host, theirs) in enumerate(others, 1):
        for field in sorted(mine.keys() - {"data.order"}):  # rank 0 has said which
            if theirs[field] != mine[field]:
                with said_once(trainer.global_rank):
                    raise UserError(
                        f"rank {rank} on {host} differs from rank 0 in {field}: "
                        f"{shown(theirs[field])} there, {shown(mine[field])} here"
                        f"{of_what(field, theirs[field], mine[field])}"
                    )


def is_over(start: Start, folder: Path) -> bool:
    if start.refusal is not None:
        with said_once(rank_zero_only.rank):  # type: ignore[attr-defined]
            raise UserError(start.refusal)
    if start.is_complete:
        log.info("%s is complete already", folder)
    return start.is_complete


def log_inputs(
    trainer: Trainer, settings: Json, data: TokenData, model_config: dict[str, Any]
) -> None:
    """The configuration and what the references cost to every logger; to W&B's lineage, folders."""
    plain = in_words(settings)
    del plain["modules"]
    for group in ("callbacks", "logger"):
        plain[group] = described(plain[group])
    if settings["model"]["init_from"] is not None:
        plain["model"]["architecture"] = model_config
    plain["reference_records"] = [reference_record(store) for store in data.references]
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
        if isinstance(logger, WandbLog):
            for store in (*data.corpora.values(), *data.references):
                name = f"{store.KIND}-{store.fingerprint[:12]}"
                manifest = store.folder / "manifest.json"
                logger.log_folder(manifest, name=name, kind=store.KIND, is_input=True)


def described(nodes: Json) -> Json:
    """Objects that Python gave by their class."""
    return {k: v if isinstance(v, Mapping) else type(v).__qualname__ for k, v in nodes.items()}
