"""Token dynamics: the losses of a frozen set of tokens over training, and their classes.

`slm dynamics` takes them from the checkpoints of runs; the callback `TokenDynamics`
(`slm train callbacks=dynamics`) while a run trains. Both leave a store in <run>/dynamics/<name>:
see trajectories.py for what is in it, classes.py for H->H, L->H, H->L and L->L, and analysis.py for
what selection takes of them. Costs one forward pass over the token set for each checkpoint.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from slm.analysis import Analysis, analyse, run_chooser
from slm.arms import folders_of, run_folders
from slm.checkpoint import is_due, read_checkpoint, read_sidecar, sidecar, step_ended
from slm.checks import check
from slm.classes import ARROWS, CLASSES, MIN_CHECKPOINTS, RunningFit
from slm.cli import command, progress
from slm.command_keys import DYNAMICS
from slm.data import Windows, open_references
from slm.errors import NonFiniteError, UserError
from slm.model import SelectiveLM, check_length
from slm.names import path_component
from slm.panels import dynamics_metrics, excess_histograms, final_media, final_summary
from slm.progress import send
from slm.rules import import_modules
from slm.score import DTYPES, computing, pick_device
from slm.shards import Corpus, Json, hash_json, nested, read_json
from slm.token_set import TokenSet, draw_windows, read_windows
from slm.tokenizer import is_tokenizer_of, load_corpus_tokenizer, share_tokenizer
from slm.tracking import WandbLog
from slm.train_keys import PRECISIONS
from slm.trajectories import TrajectoryStore, make_plan, remove_store, token_losses
from slm.trust import refuse_code

log = logging.getLogger("slm.dynamics")
EXACT = ("eager", "sdpa")  # attention that every machine has
PARTS = 32  # of a run: how often the callback looks


# ---- what both ways share -----------------------------------------------------------------------


def open_windows(
    corpus: str,
    references: str | Sequence[str] | None,
    combine: str | None,
    check: str,
    prefix: str,
) -> Windows:
    stores = open_references(references, combine, check, prefix)
    return Windows(Corpus.open(corpus, check), stores, combine)


def draw(windows: Windows, num_targets: int, seed: int, by_source: bool) -> TokenSet:
    numbers = draw_windows(windows, num_targets, seed, by_source)
    tokens = read_windows(windows, numbers, load_corpus_tokenizer(windows.corpus))
    if tokens.num_targets < num_targets:
        log.warning(
            "%s has %s targets, fewer than num_targets=%s: all of them are taken",
            *(windows.corpus.folder, f"{tokens.num_targets:,}", f"{num_targets:,}"),
        )
    return tokens


def store_folder(run: Path, name: Any, prefix: str) -> Path:
    return run / "dynamics" / path_component(f"{prefix}name", name)


def run_record(run: Path) -> Json:
    """What the losses depend on of a run, and the rule that it selects with."""
    identity = read_json(run / "run.json")
    return {
        "identity_sha256": hash_json(identity),
        "seed": identity["seed"],
        "selection": nested(identity, "selection."),
        "selection_start": identity["selection_start"] if "selection_start" in identity else 0,
        "micro_batch_size": identity["data.micro_batch_size"],
    }


def classify_run(store: TrajectoryStore, name: str, threshold: float, mean_loss: Any) -> Analysis:
    """The final classes: one record a token, and a table a checkpoint and class."""
    analysis = analyse(store, name, threshold, mean_loss)
    store.write_classes(analysis.trajectories, class_rows(analysis), threshold, mean_loss)
    if analysis.uneven:
        log.warning(
            "%s: the checkpoints are unevenly spaced in tokens (%s); the line is fitted over "
            "their indices, as in the paper",
            *(store.folder, ", ".join(f"{seen:,}" for seen in analysis.tokens_seen[:8])),
        )
    return analysis


def class_rows(analysis: Analysis) -> list[Json]:
    """One row a checkpoint and class, by the final classes; empty where there is nothing."""
    rows = []
    for index, seen in enumerate(analysis.tokens_seen):
        for number, name in enumerate(CLASSES):
            share = analysis.shares[name]
            kept = analysis.kept.by_class[index, number] if analysis.kept else np.nan
            row = {"tokens_seen": int(seen), "class": name} | share._asdict()
            row |= {"loss": analysis.class_losses[index, number], "kept_frac": kept}
            rows.append({k: "" if v != v else v for k, v in row.items()})
    return rows


# ---- during training ----------------------------------------------------------------------------


class TokenDynamics(Callback):
    """Token losses every `every_tokens` tokens, from step 0, into <run_dir>/dynamics/<name>.

    Logs dynamics/*: the mean loss, and from the third time on the classes as far as they are known
    by then, their losses and what the rule in force keeps of them. At the end the classes are
    made anew from all checkpoints. It draws no random number and reads no training sample.

    every_tokens: null for about 32 times in the run, in whole steps
    batch_size:   windows of one forward
    """

    def __init__(
        self,
        run_dir: str,
        name: str,
        corpus: str,
        references: str | Sequence[str] | None,
        combine: str | None,
        num_targets: int,
        seed: int,
        by_source: bool,
        every_tokens: int | None,
        batch_size: int,
        threshold: float,
        mean_loss: float | None,
    ):
        self.run_dir = Path(run_dir)
        self.folder = store_folder(self.run_dir, name, "callbacks.dynamics.")
        self.windows = open_windows(corpus, references, combine, "size", "callbacks.dynamics.")
        self.tokens = draw(self.windows, num_targets, seed, by_source)
        self.every_tokens, self.batch_size = every_tokens, batch_size
        self.threshold, self.mean_loss = threshold, mean_loss

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        training: Corpus = trainer.datamodule.corpus  # type: ignore[attr-defined]
        check_same_tokenizer(self.windows.corpus, training)
        check_length(pl_module.lm.model.config, self.windows.corpus.seq_len)
        self.every_tokens = self.every_tokens or even_part(trainer)
        has_it = False
        if trainer.is_global_zero:
            self._warn(trainer, training.fingerprint)
            self.store = self._open(
                trainer.global_step == 0, pl_module.tokens_seen, PRECISIONS[str(trainer.precision)]
            )
            has_it = self.store.has(pl_module.tokens_seen)
        starts = trainer.global_step == 0 or is_due(trainer, self.every_tokens, PARTS)
        if starts and not trainer.strategy.broadcast(has_it):
            self._evaluate(trainer, pl_module)

    def _warn(self, trainer: Trainer, fingerprint: str) -> None:
        """Of what would be noticed when it is too late."""
        warn_of_training_text(self.windows.corpus, fingerprint)
        every, total = self.every_tokens or 1, tokens_of(trainer)
        if total // every + 1 < MIN_CHECKPOINTS:
            log.warning(
                "callbacks.dynamics.every_tokens is %d in a run of %d tokens: fewer than %d times, "
                "so there will be no classes",
                *(every, total, MIN_CHECKPOINTS),
            )

    def _open(self, is_new: bool, tokens_seen: int, precision: str) -> TrajectoryStore:
        """A run that starts anew has no trajectories; one that goes on forgets what came later."""
        if is_new:
            remove_store(self.folder)
        plan = make_plan(self.windows, self.tokens.windows, run_record(self.run_dir), precision)
        store = TrajectoryStore.create(self.folder, plan, self.tokens)
        store.forget_after(tokens_seen)
        self.fit = RunningFit(self.threshold, self.mean_loss)
        self.chooser = run_chooser(store, warns=True)
        for column in store.losses():
            self.fit.add(column)
        return store

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if step_ended(trainer, batch_idx) and is_due(trainer, self.every_tokens, PARTS):
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        losses = self._losses(trainer, pl_module)
        if not np.isfinite(losses).all():
            raise NonFiniteError(
                f"step {trainer.global_step}: the loss of {np.sum(~np.isfinite(losses))} of the "
                f"{len(losses)} tokens in {self.folder} is not finite"
            )
        if trainer.is_global_zero:
            self.store.append(pl_module.tokens_seen, losses)
            self.fit.add(losses)
            self._log(trainer, losses, pl_module.tokens_seen)
            if trainer.global_step == trainer.max_steps:
                self._finish(trainer, pl_module.tokens_seen)

    def _log(self, trainer: Trainer, losses: np.ndarray, seen: int) -> None:
        label = self.fit.labels() if self.fit.is_ready else None
        selected = None if self.chooser is None else self.chooser.selected(losses, seen)
        send(trainer, dynamics_metrics(losses, label, selected))
        if "reference_loss" in self.tokens.columns:
            excess_loss = losses - self.tokens.columns["reference_loss"]
            histograms = excess_histograms(excess_loss, selected)
            for logger in wandb_logs(trainer):
                logger.log_media(histograms, trainer.global_step, seen)

    def _losses(self, trainer: Trainer, pl_module: Any) -> np.ndarray:  # (M,)
        """Every rank computes its part of the windows, as many forwards as the others."""
        numbers, world = self.tokens.windows, trainer.world_size
        per_rank = -(-len(numbers) // world)
        places = np.arange(per_rank) + per_rank * trainer.global_rank
        mine = numbers[np.minimum(places, len(numbers) - 1)]
        with trainer.precision_plugin.forward_context():
            found = token_losses(pl_module.lm, self.windows, mine, self.batch_size)
        gathered = pl_module.all_gather(torch.from_numpy(found).to(pl_module.device))
        grid = gathered.reshape(-1, found.shape[1])[: len(numbers)].cpu().numpy()
        return grid[self.tokens.live]

    def _finish(self, trainer: Trainer, seen: int) -> None:
        """At the last step and before its checkpoint, so that a run killed here does it again."""
        if not self.fit.is_ready:
            return
        name, manifest = self.run_dir.name, self.store.folder / "manifest.json"
        analysis = classify_run(self.store, name, self.threshold, self.mean_loss)
        for logger in wandb_logs(trainer):
            logger.log_media(final_media(analysis), trainer.global_step, seen)
            logger.log_summary(final_summary(analysis))
            logger.log_folder(manifest, name=f"dynamics-{name}", kind="dynamics", is_input=False)


def wandb_logs(trainer: Trainer) -> list[WandbLog]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLog)]


def even_part(trainer: Trainer) -> int:
    """Tokens of whole steps, about 1/32 of the run: the fit takes the checkpoints as even."""
    return max(1, round(trainer.max_steps / PARTS)) * (tokens_of(trainer) // trainer.max_steps)


def tokens_of(trainer: Trainer) -> int:
    """Of the whole run."""
    return trainer.max_steps * trainer.datamodule.tokens_per_step  # type: ignore[attr-defined]


def warn_of_training_text(corpus: Corpus, fingerprint: str) -> None:
    if corpus.fingerprint == fingerprint:
        log.warning("%s is what the run trains on: its tokens are not held out", corpus.folder)


def check_same_tokenizer(mine: Corpus, training: Corpus) -> None:
    found, expected = (corpus.manifest["tokenizer_sha256"] for corpus in (mine, training))
    if not share_tokenizer(mine, training):
        raise UserError(
            f"{mine.folder} has tokenizer {found}, the training corpus {training.folder} {expected}"
        )


# ---- from checkpoints ---------------------------------------------------------------------------


def load_checkpoint(path: Path, corpus: Corpus) -> SelectiveLM:
    """The model of a checkpoint that fits the corpus."""
    saved = read_checkpoint(path)
    if "about" not in saved:
        raise UserError(f"{path} does not say its architecture: an older version wrote it")
    about, expected = saved["about"], corpus.manifest["tokenizer_sha256"]
    if not is_tokenizer_of(corpus, about["tokenizer_sha256"]):
        raise UserError(
            f"{path} was trained with tokenizer {about['tokenizer_sha256']}, {corpus.folder} was "
            f"made with {expected}"
        )
    fields = json.loads(about["config"])
    refuse_code(str(path), fields)
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    check_length(config, corpus.seq_len)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=attention_of(path, about),
        trust_remote_code=False,
    )
    lm, prefix = SelectiveLM(model), "lm."
    lm.load_state_dict({k.removeprefix(prefix): v for k, v in saved["state_dict"].items()})
    return lm


def attention_of(path: Path, about: Json) -> str | None:
    """What the run computed with, where it is of EXACT; a folder's word fetches no kernel."""
    trained = about["attn_implementation"] if "attn_implementation" in about else None
    if trained in EXACT:
        return trained
    if trained is not None:
        log.warning("%s: attention %r is not taken, losses differ by its rounding", path, trained)
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """Finished ones, in the order of training."""
    found = sorted((run / "checkpoints").glob("step-*.ckpt"))
    return [path for path in found if sidecar(path).exists()]


def tokens_seen_by(path: Path) -> int:
    """As its sidecar says: the file itself may have many gigabytes."""
    return read_sidecar(path)["tokens_seen"]


def missing(run: Path, store: TrajectoryStore) -> list[tuple[Path, int]]:
    """(checkpoint, tokens seen) of what the store lacks; a live run may remove one meanwhile."""
    found = []
    for path in checkpoints_of(run):
        with suppress(FileNotFoundError):
            found.append((path, tokens_seen_by(path)))
    return [(path, seen) for path, seen in found if not store.has(seen)]


def load_if_there(path: Path, corpus: Corpus) -> SelectiveLM | None:
    try:
        return load_checkpoint(path, corpus)
    except (UserError, OSError):
        if path.exists() and sidecar(path).exists():
            raise
    log.warning("%s is gone: its run goes on and keeps fewer checkpoints", path)
    return None


def evaluate_runs(runs: Sequence[Path], windows: Windows, tokens: TokenSet, config: Any) -> list:
    """Append what each run's store lacks."""
    stores = [open_store(run, windows, tokens, config) for run in runs]
    todo = [
        (store, path, seen)
        for run, store in zip(runs, stores, strict=True)
        for path, seen in missing(run, store)
    ]
    warn_of_new_classes([store for store, _, _ in todo])
    device = pick_device(config.device)
    with progress("token losses", len(todo) * tokens.num_targets, "tokens") as advance:
        for store, path, seen in todo:
            lm = load_if_there(path, windows.corpus)
            if lm is not None:
                lm.to(device, DTYPES[config.dtype])
                with computing(device, config.dtype):
                    grid = token_losses(lm, windows, tokens.windows, config.batch_size)
                store.append(seen, grid[tokens.live])
                advance(tokens.num_targets)
    return stores


def open_store(run: Path, windows: Windows, tokens: TokenSet, config: Any) -> TrajectoryStore:
    plan = make_plan(windows, tokens.windows, run_record(run), config.dtype)
    warn_of_training_text(windows.corpus, read_json(run / "run.json")["corpus"])
    folder = store_folder(run, config.name, "")
    store = TrajectoryStore.create(folder, plan, tokens, config.check)
    run_chooser(store, warns=True)  # what would be noticed when it is too late
    return store


def warn_of_new_classes(stores: Sequence[TrajectoryStore]) -> None:
    for folder in dict.fromkeys(store.folder for store in stores):
        if (folder / "trajectories.npy").exists():
            log.warning("%s has classes already: with more checkpoints they are others", folder)


def analyse_stores(
    runs: Sequence[Path], stores: Sequence[TrajectoryStore], config: Any
) -> list[Analysis]:
    """Of the runs with enough checkpoints; the others are named."""
    found = []
    for run, store in zip(runs, stores, strict=True):
        count = len(store.checkpoints)
        if count < MIN_CHECKPOINTS:
            log.warning("%s has %d checkpoints, a trajectory needs %d", run, count, MIN_CHECKPOINTS)
            continue
        found.append(classify_run(store, run.name, config.threshold, config.mean_loss))
    if not found:
        raise UserError(
            f"none of the {len(runs)} runs has {MIN_CHECKPOINTS} checkpoints: train with "
            "callbacks.checkpoints.keep=null, or with callbacks=dynamics"
        )
    return found


# ---- the command --------------------------------------------------------------------------------


def dynamics(config: Any) -> list[Analysis]:
    """Fill the stores of all runs, then classify."""
    check(config, DYNAMICS)
    import_modules(config.modules)
    runs = run_folders(folders_of(config.runs))
    windows = open_windows(config.corpus, config.references, config.combine, config.check, "")
    tokens = draw(windows, config.num_targets, config.seed, config.by_source)
    stores = evaluate_runs(runs, windows, tokens, config)
    return analyse_stores(runs, stores, config)


def print_table(analyses: Sequence[Analysis]) -> None:
    table = Table("run", "class", "tokens", "share", "95%", "loss, first", "last", "kept, last")
    for analysis in analyses:
        for number, name in enumerate(CLASSES):
            share, losses = analysis.shares[name], analysis.class_losses[:, number]
            kept = "" if analysis.kept is None else f"{analysis.kept.by_class[-1, number]:.1%}"
            table.add_row(
                escape(analysis.name) if number == 0 else "",
                ARROWS[name],
                f"{share.num_tokens:,}",
                *(f"{share.share:.1%}", f"{share.low:.1%} to {share.high:.1%}"),
                *(f"{losses[0]:.3f}", f"{losses[-1]:.3f}", kept),
            )
    Console().print(table)


@command("dynamics")
def main(config: Any) -> None:
    analyses = dynamics(config)
    print_table(analyses)
    for analysis in analyses:
        log.info("%s", analysis.store.folder)


if __name__ == "__main__":
    main()
