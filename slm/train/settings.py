"""Settings of a run that do not fit its data or each other: said before anything is computed.

Types and ranges of single keys are in keys.py.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from slm.command_keys import PRECISIONS
from slm.errors import UserError, shown
from slm.selection.registry import rule_word
from slm.selection.rule import Selection
from slm.store.columns import COLUMNS, DOMAIN
from slm.store.files import Json
from slm.store.shards import SHORT, References
from slm.train.data import TokenData
from slm.train.keys import check_one_step

log = logging.getLogger("slm.train")
FROM_SCRATCH = 1e-3  # the learning rate of conf/optimizer


def check_config(settings: Json, data: TokenData, selection: Selection) -> None:
    check_references(settings, data, selection)
    max_tokens, start = settings["max_tokens"], settings["selection_start"]
    check_one_step(max_tokens, data.tokens_per_step)
    if start >= max_tokens:
        raise UserError(
            f"selection_start is {start}, max_tokens {max_tokens}: the rule would never "
            "choose (selection=all trains on every token)"
        )
    warn_of_late_points(selection, max_tokens)
    warn_of_high_rate(settings["model"]["init_from"], settings["optimizer"]["adamw"]["lr"])
    for store in data.references:
        warn_of_other_precision(store, settings["trainer"]["precision"])
    best_of = settings["callbacks"]["checkpoints"]["best_of"]
    if best_of is not None and best_of not in data.heldout:
        raise UserError(
            f"callbacks.checkpoints.best_of is {best_of!r}, data.heldout has {sorted(data.heldout)}"
        )


def check_scored(max_tokens: int, data: TokenData) -> None:
    """A run over a corpus that is scored in part reads no window twice, and none without scores.

    Where `slm bind missing=skip` left windows out there are no more to score: the others are all
    that the run reads, as often as it likes.
    """
    if data.mixture is not None:
        data.mixture.check_epochs(windows_of(max_tokens, data), data.seed)
        return
    partial = [store for store in data.references if store.is_unfinished]
    needed = windows_of(max_tokens, data)
    have = len(data.windows.available)
    if partial and needed > have:
        first = int(np.flatnonzero(~np.logical_and.reduce([s.scored for s in partial]))[0])
        raise UserError(
            f"max_tokens={max_tokens} reads {needed} windows, and {partial[0].folder} has scores "
            f"of {have} of the {len(data.windows)} of {data.corpus.folder} (none of window "
            f"{first}): `slm score max_tokens={needed * data.corpus.seq_len}` adds what is missing"
        )


def windows_of(max_tokens: int, data: TokenData) -> int:
    """That a run reads: whole steps."""
    return round(max_tokens / data.tokens_per_step) * data.batch_size


def warn_of_late_points(selection: Selection, max_tokens: int) -> None:
    for schedule in selection.schedules:
        last = schedule.points[-1][0]
        if last > max_tokens:
            log.warning(
                "the last point of a select_ratio schedule lies at %d tokens, the run ends at %d "
                "with a ratio of %.4g",
                *(last, max_tokens, schedule.at(max_tokens)),
            )


def warn_of_high_rate(init_from: str | None, rate: float) -> None:
    """A folder of `slm train` went on at such a rate already; trillions of tokens did not."""
    if init_from is None or (Path(init_from) / "slm.json").exists() or rate < FROM_SCRATCH:
        return
    log.warning(
        "optimizer.adamw.lr=%g is a rate for new weights, and %s is a pretrained model, which a "
        "few steps at it undo: experiment=continue_small (5e-5), continue_1b (8e-5) and sft (2e-5) "
        "have rates for one, and say whose they are",
        *(rate, init_from),
    )


def check_references(settings: Json, data: TokenData, selection: Selection) -> None:
    """Missing scores never fall back to plain cross-entropy."""
    rule, online = rule_word(settings["selection"]), settings["online_reference"]
    needs = selection.needs
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
    there = data.windows.columns
    if DOMAIN.key in needs and DOMAIN not in there:
        raise UserError(
            f"selection {rule} needs data.references=[GENERAL,DOMAIN] with data.combine="
            f"{DOMAIN.name}, found data.combine {shown(data.windows.combine)}"
        )
    check_short_context(rule, data, selection, online)
    warn_of_unknown_base(data)
    missing = [c.name for c in COLUMNS.values() if c.key in needs and c not in there]
    if missing and online is None:
        raise UserError(
            f"selection {rule} needs one reference with {' and '.join(missing)}, found "
            f"{', '.join(str(store.folder) for store in data.references)} (make it with "
            f"`slm score columns=[{','.join(missing)}]`)"
        )


def check_short_context(
    rule: str, data: TokenData, selection: Selection, online: str | None
) -> None:
    """Against an ordinary reference, what it would choose is what has been learned already."""
    whole = [str(one.folder) for one in data.references if SHORT[0] not in one.manifest]
    if selection.short_context and (whole or online is not None):
        raise UserError(
            f"selection {rule} needs scores of a short context (`slm score context=... "
            f"stride=...`), and {', '.join(whole) or online} has that of whole windows"
        )


def warn_of_unknown_base(data: TokenData) -> None:
    if data.windows.combine == DOMAIN.name:
        for store in data.references:
            if store.base is None:
                log.warning(
                    "%s does not say what its model was trained from: that of the other reference "
                    "must be the same",
                    store.folder,
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


def check_one_architecture(settings: Json, given: Iterable[str]) -> None:
    """Refuse what would be read and not used. given: what names it, in whatever form."""
    for word in given:
        init_from = settings["model"]["init_from"]
        if init_from is not None:
            raise UserError(
                f"{word} is given with model.init_from={init_from}, which has an "
                "architecture of its own: leave one of them out"
            )
