"""run.json: what a run is made of. A folder that holds another run is refused."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm.errors import UserError, shown
from slm.model.folder import init_identity
from slm.selection.names import selection_name
from slm.selection.registry import by_word, in_words, trained_word
from slm.store.claims import Claim, claim, owner_of, remove_temporaries
from slm.store.fields import SIZE, check_fields, of_what
from slm.store.files import Json, nested, read_json, remove_empty, write_record
from slm.train.checkpoint import newest_checkpoint
from slm.train.curves import USUAL
from slm.train.data import TokenData
from slm.train.extend import Schedule, extend
from slm.train.order import NEW, ORDERS

log = logging.getLogger("slm.train")


def run_identity(settings: Json, data: TokenData) -> dict[str, Any]:
    """What must not change when a run is continued; folders may move, so hashes stand for them."""
    plain = in_words(settings, word=trained_word)
    init_from = plain["model"].pop("init_from")
    if init_from is not None:
        del plain["model"]["architecture"]  # the folder's own counts
    if "backward" in plain["model"] and plain["model"]["backward"] == "exact":
        del plain["model"]["backward"]  # all runs of builds that knew no other
    plain["model"].pop("keys_cache_bytes", None)  # changes no number
    if "override" in plain["model"] and not plain["model"]["override"]:
        del plain["model"]["override"]  # as of builds that did not know it
    rule = by_word(plain["selection"])
    bounds = ("min_", "max_", "select_ratio")  # null: as in builds that knew none
    rule = {k: v for k, v in rule.items() if v is not None or not k.startswith(bounds)}
    loaded = None if init_from is None else init_identity("model.init_from", init_from)
    return {
        "seed": plain["seed"],
        "max_tokens": plain["max_tokens"],
        "corpus": data.corpus.fingerprint,
        "references": [store.fingerprint for store in data.references],
        "data.combine": data.windows.combine,
        "online_reference": online_identity(settings),
        "selection_start": plain["selection_start"],
        "init_from": loaded,
        "data.order": data.order,
        "data.batch_size": plain["data"]["batch_size"],
        "data.micro_batch_size": plain["data"]["micro_batch_size"],
        "trainer.precision": plain["trainer"]["precision"],
        **flat("data.mixture", {} if data.mixture is None else data.mixture.shares),
        **flat("model", plain["model"]),
        **flat("selection", rule),
        **flat("optimizer", plain["optimizer"]),
    }


def adopt_order(folder: Path, data: TokenData) -> None:
    """Unless one is asked for, a run goes on in the order that it began in; a new one is keyed."""
    path = folder / "run.json"
    if data.order is None:
        data.order = (USUAL | read_json(path))["data.order"] if path.exists() else NEW
    if data.order not in ORDERS:
        raise UserError(f"{path}: data.order is {data.order!r}, known are {', '.join(ORDERS)}")


def flat(prefix: str, tree: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"prefix.a.b": 1}"""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(f"{prefix}.{key}", value).items()}


def online_identity(settings: Json) -> str | None:
    name = settings["online_reference"]
    return None if name is None else init_identity("online_reference", name)


def adopt_run(
    folder: Path, identity: dict[str, Any], resume: str, tokens_per_step: int, schedule: Schedule
) -> Path | None:
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
    before = USUAL | in_words(read_json(path))
    check_fields(path, before, {"max_tokens": SIZE})
    is_longer = before["max_tokens"] < identity["max_tokens"]
    for field in [*identity, *sorted(before.keys() - identity.keys())]:
        if identity.get(field) != before.get(field) and not (field == "max_tokens" and is_longer):
            raise UserError(
                f"{folder} holds another run: {field} is {shown(before.get(field))} in run.json, "
                f"{shown(identity.get(field))} now"
                f"{of_what(field, before.get(field), identity.get(field))}; choose another `out`"
            )
    if resume == "never":
        raise UserError(f"{folder} holds this run already (run.json), and resume is 'never'")
    if is_longer:
        return extend(folder, identity, before["max_tokens"], tokens_per_step, schedule)
    return newest_checkpoint(folder / "checkpoints", log.warning)


@contextmanager
def only_writer(folder: Path) -> Iterator[Claim]:
    """Refuse a folder that another live process trains in.

    A run that is refused before its first step leaves nothing.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / "run.json").exists()
    try:
        with claim(folder / "run.claim") as mine:
            if mine is None:
                owner = owner_of(folder / "run.claim")
                raise UserError(f"another process trains in {folder} ({owner}, see run.claim)")
            try:
                yield mine
            except UserError:
                if is_new and {one.name for one in folder.iterdir()} <= {"run.json", "run.claim"}:
                    (folder / "run.json").unlink(missing_ok=True)
                raise
    finally:
        remove_empty(made)


def run_title(folder: Path) -> str:
    """excess k = 0.6, seed 0 for a sweep's job, and what else it differs in; a folder's name."""
    path = folder / "run.json"
    if "=" not in folder.name or not path.exists():
        return folder.name
    identity = in_words(read_json(path))
    rule = selection_name(nested(identity, "selection."))
    more = [word for word in folder.name.split(",") if not re.match(r"selection[.=]|seed=", word)]
    return ", ".join([rule, f"seed {identity['seed']}", *more])
