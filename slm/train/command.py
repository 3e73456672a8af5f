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

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only

from slm.errors import UserError
from slm.selection.rule import Selection
from slm.stage import Folder, stage
from slm.store.files import Json
from slm.train.compose import GROUPS, Group, composed, objects_in
from slm.train.curves import Run
from slm.train.fit import fit
from slm.train.keys import ARGUMENTS, FOLDERS, check_train
from slm.train.settings import check_one_architecture
from slm.train.stages import run_stages

log = logging.getLogger("slm.train")
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
# Lightning greets, advises and repeats itself; its warnings still show.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


@stage(ARGUMENTS)
def train(
    corpus: Folder | None,
    out: Folder,
    max_tokens: int,
    *,
    references: Folder | Sequence[Folder] | Mapping[str, Folder] | None = None,
    heldout: Mapping[str, Folder] | None = None,
    mixture: Mapping[str, Mapping[str, Any]] | None = None,
    selection: Selection | Group = "excess",
    model: Group = "llama_600k",
    data: Group = "shards",
    optimizer: Group = "adamw",
    trainer: Group = "default",
    callbacks: Group = "default",
    logger: Group = "default",
    selection_start: int = 0,
    online_reference: Folder | None = None,
    stages: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    modules: Sequence[str] = (),
    resume: str = "auto",
) -> Run:
    """Train a causal language model on the tokens that a rule selects, or go on with it.

    A group is a word or a dict, as in conf/: "llama_10m" is conf/model/llama_10m.yaml,
    {"init_from": folder} is laid over the usual choice, and {"defaults": ["llama_10m"], ...} over
    that file.

    Args:
        corpus: what is trained on, made by `prepare`.
        out: folder of the run. The same call again goes on with an interrupted run.
        max_tokens: training tokens, unselected ones included; rounded to optimizer steps.
        references: scores of this corpus, made by `score`; a list of them; or {source: scores}.
        heldout: {name: corpus}, evaluated during training.
        mixture: several corpora in place of one (corpus=None), by shares of tokens:
            {part: {"corpus": folder, "references": scores, "share": 0.6, "max_epochs": 4}}.
        selection: a rule, `Excess(0.6)`, or its word, "all".
        model: architecture, init_from (a model folder to start from), ...: conf/model.
        data: batch_size, micro_batch_size, heldout_windows, combine, ...: conf/data.
        optimizer: {"adamw": {"lr": 1e-3}, "schedule": ..., "gradient_clip": ...}: conf/optimizer.
        trainer: accelerator, devices, precision, ...: conf/trainer.
        callbacks: {name: settings or a Callback}, "dynamics", ...: conf/callbacks.
        logger: {name: settings or a Logger}, "csv", "none": conf/logger.
        selection_start: training tokens before the rule takes over; until then: all tokens.
        online_reference: a model folder that scores each batch, in place of `references`.
        stages: a run each in a folder below `out`, one after the other: {"name", "until_tokens",
            "lr", "data", ...}, see slm/train/stages.py; the last ends at max_tokens.
        seed: of weights, order of the samples, dropout, random selection.
        modules: files or dotted names with rules, callbacks, modeling code of your own.
        resume: "auto", or "never" to refuse a folder that holds this run already.

    Returns:
        The run's folder: its model, its curves, its lineage.

    Raises:
        UserError: a setting does not fit, or the folder holds another run.
    """
    given = dict(locals())
    given["data"] = with_folders(data, {name: given.pop(name) for name in FOLDERS})
    given["out"] = given["run_dir"] = os.path.abspath(out)
    settings = composed(given)
    check_train(settings)
    check_one_architecture(settings, names_architecture(model))
    for name in ("callbacks", "logger"):
        settings[name] |= objects_in(given[name])
    if settings["stages"] is not None:
        return run_stages(settings)
    fit(settings)
    return Run(Path(settings["out"]))


def with_folders(data: Group, folders: Mapping[str, Any]) -> Any:
    """The group data with the folders, which are arguments of their own."""
    if isinstance(data, str):
        return {"defaults": [data], **folders}
    if not isinstance(data, Mapping):
        return data  # the check of the settings says what it must be
    for name in folders.keys() & data.keys():
        raise UserError(f"data.{name} is given: {name} is an argument of its own")
    return {**data, **folders}


def names_architecture(model: Group) -> list[str]:
    """Whether it is given, beside what conf/ has."""
    is_over = isinstance(model, Mapping) and "defaults" not in model
    return ["model.architecture"] if is_over and "architecture" in model else []


# ---- the command --------------------------------------------------------------------------------


def arguments(settings: Json) -> Json:
    """Of `train`, from what Hydra composed: whole groups, over nothing."""
    rest = dict(settings)
    rest["out"] = rest.pop("run_dir")
    groups = {name: rest.pop(name, None) for name in GROUPS}
    whole = {k: {"defaults": [], **v} if isinstance(v, dict) else v for k, v in groups.items()}
    folders = {name: whole["data"].pop(name, None) for name in FOLDERS}
    return rest | whole | folders


def run(**settings: Any) -> None:
    words = [word.lstrip("+~") for word in HydraConfig.get().overrides.task]
    named = [word for word in words if word.startswith("model.architecture")]
    check_one_architecture(settings, named)
    made = train(**arguments(settings))
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # Lightning sets it on import
        log.info("model: %s", made.model)
