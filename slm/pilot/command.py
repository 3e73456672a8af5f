"""Will selection pay for me? `slm pilot` (see --help).

    plan.json           what the pilot is made of; another is refused in the same folder
    heldout/            documents of the corpus itself that no arm trains on
    seed-0/, seed-1/    a sample each, and the arms that trained on it, see arms.py
    clock.json          seconds of its trainings and forwards, and of all else
    reference/tokens/   token losses of the reference model itself
    pilot.json          all answers, with their intervals
    pilot.html          the same on one page
    made.json           the hashes of these two, which the next call replaces

Arms that are done are not trained again: the same command goes on after a kill, and one with more
`max_seeds` adds seeds. Costs what its trainings and forwards cost, which pilot.json counts.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from slm.command_keys import PILOT
from slm.errors import UserError
from slm.model.folder import init_identity, model_sha256
from slm.pilot.answers import answers
from slm.pilot.page import write_page
from slm.pilot.trials import Parts, Trials, heldout_sets
from slm.pilot.verdict import sequential
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.files import Json, hash_json, write_json
from slm.store.own_files import check_own, replacing
from slm.store.shards import Corpus, adopt_plan
from slm.train.build import is_torchrun
from slm.train.compose import Group, laid, usual_choices
from slm.train.lineage import short_name

log = logging.getLogger("slm.pilot")
MADE_BY = "slm pilot"


class Pilot(NamedTuple):
    """What a pilot left."""

    folder: Path
    answers: Json  # pilot.json

    @property
    def page(self) -> Path:
        return self.folder / "pilot.html"

    @property
    def verdict(self) -> str:
        return self.answers["verdict"]["sentence"]


def plan_of(config: Any, parts: Parts, groups: Mapping[str, Group]) -> Json:
    """What every number depends on; how many seeds there are is not part of it."""
    sets = {**config.heldout, **(config.elsewhere or {})}
    usual = usual_choices()
    plain: Any = {
        key: OmegaConf.to_container(laid(key, groups[key], [usual[key]]))
        for key in ("model", "optimizer", "trainer")
    }
    init_from = plain["model"].pop("init_from")
    del plain["model"]["architecture"]  # the base has its own
    return {
        "kind": "pilot",
        "corpus": parts.corpus.fingerprint,
        "reference_model": model_sha256(config.reference_model),
        "init_from": init_identity("model.init_from", init_from),
        "curated": parts.curated and parts.curated.corpus.fingerprint,
        "curated_share": config.curated_share,
        "heldout": {name: Corpus.open(folder).fingerprint for name, folder in sets.items()},
        "heldout_windows": config.heldout_windows,
        "max_tokens": parts.tokens,
        "seed": config.seed,
        "settings": hash_json(plain | {"data": groups["data"]}),
    }


@stage(PILOT)
def pilot(
    corpus: Folder,
    out: Folder,
    reference_model: Folder,
    heldout: Mapping[str, Folder],
    *,
    model: Group,
    budget: int | str = "1%",
    select_ratios: Sequence[float] = (0.4, 0.6),
    curated: Folder | None = None,
    curated_share: float | None = None,
    elsewhere: Mapping[str, Folder] | None = None,
    target_tokens: int | None = None,
    seeds: int = 3,
    max_seeds: int = 6,
    level: float = 0.05,
    margin: float = 0.01,
    heldout_windows: int = 256,
    data: Mapping[str, int] = {"batch_size": 32, "micro_batch_size": 32},  # noqa: B006
    optimizer: Group = "adamw",
    trainer: Group = "default",
    seed: int = 0,
    modules: Sequence[str] = (),
) -> Pilot:
    """Say whether selecting tokens will pay, from a sample of the corpus, with intervals.

    A sample is drawn by source and scored; all tokens, random tokens and those of the highest
    excess loss are trained on from one base, in one order; seeds are added while a question is
    open.

    Args:
        corpus: what the target would train on, made by `prepare`.
        out: folder of the pilot. The same call again goes on where it was.
        reference_model: a model folder with the corpus's tokenizer.
        heldout: {name: corpus}: text that the target is to be good at; the first set decides.
        model: {"init_from": folder}: the base that all arms begin with; more as in `train`.
        budget: that one arm trains on: a share of the corpus, "1%", or a number of tokens.
        select_ratios: each k that is tried, between 0 and 1.
        curated: a corpus of the text that the reference was trained on, where the target may be
            trained on it too: an arm mixes it in.
        curated_share: of that arm's tokens; None: what it has of both corpora.
        elsewhere: {name: corpus}: other text, on which it is shown what selection costs.
        target_tokens: of the run that is planned; None: the corpus once.
        seeds: of every arm before the first look.
        max_seeds: at most, where a question is still open.
        level: the chance at which selection may be advised though it does not help.
        margin: nats per token, a difference below which does not matter.
        heldout_windows: at most so many of each held-out set, evenly spread.
        data: batch_size and micro_batch_size, windows of a step and of a forward.
        optimizer: as in `train`.
        trainer: as in `train`; one device.
        seed: of the first sample and its runs; the next has the next.
        modules: files or dotted names with modeling code of your own.

    Returns:
        The folder, all answers and the verdict.

    Raises:
        UserError: a setting does not fit, a held-out text is trained on, or the folder holds
            another pilot.
    """
    config = SimpleNamespace(**locals())
    import_modules(modules)
    check_seeds(seeds, max_seeds)
    check_own(Path(out), ["pilot.json", "pilot.html"], MADE_BY)
    data = {**data, "heldout_windows": heldout_windows}
    groups = {"model": model, "data": data, "optimizer": optimizer, "trainer": one_device(trainer)}
    if not isinstance(model, Mapping) or not model.get("init_from"):
        raise UserError("model.init_from must be given: the base that all arms begin with")
    parts = Parts(config, data)
    sets = heldout_sets(config, parts)
    adopt_plan(Path(out), plan_of(config, parts, groups), "another pilot")
    trials = Trials(config, sets, parts, groups)
    outcome = sequential(trials.rules, list(trials.arms), trials.look)
    found = answers(trials.inputs(outcome.seeds), outcome, parts.tokens)
    found["samples"] = {f"seed {number}": one for number, one in trials.sampled.items()}
    found["copies_left_out"] = parts.copies.left_out()
    found["inputs"] = inputs_named(config, groups)
    with replacing(Path(out), MADE_BY) as to:
        found["overhead"] = trials.work.record()
        write_page(to / "pilot.html", found)
        found["overhead"] = trials.work.record()
        write_json(to / "pilot.json", found)
    return Pilot(Path(out), found)


def one_device(trainer: Group) -> Group:
    """Arms follow one another in this process."""
    if is_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and a pilot is one, on one "
            "device: start `slm pilot` by itself"
        )
    given = {"defaults": [trainer]} if isinstance(trainer, str) else dict(trainer)
    return given | {"devices": 1, "num_nodes": 1}


def inputs_named(config: Any, groups: Mapping[str, Any]) -> Json:
    """Without paths of this machine."""
    named = {"corpus": config.corpus, "reference_model": config.reference_model}
    named |= {"base": groups["model"]["init_from"], "curated": config.curated}
    return {key: folder and short_name(folder) for key, folder in named.items()}


def check_seeds(seeds: int, max_seeds: int) -> None:
    if max_seeds < seeds:
        raise UserError(f"max_seeds is {max_seeds}, seeds {seeds}: it must be at least as many")


def run(**settings: Any) -> None:
    groups = ("model", "optimizer", "trainer")
    whole: Any = {name: {"defaults": [], **settings.pop(name)} for name in groups}
    made = pilot(**settings, **whole)
    print(made.verdict)
    log.info("page: %s", made.page)
