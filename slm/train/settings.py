"""Settings of a run that do not fit its data or each other: said before anything is computed.

Types and ranges of single keys are in keys.py.
"""

import logging

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from slm.errors import UserError
from slm.model.device import PRECISIONS
from slm.selection.rule import Selection
from slm.store.shards import References
from slm.train.data import TokenData

log = logging.getLogger("slm.train")


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
