"""The arms of a pilot as they come to be: what is drawn, scored, trained, and read for a look."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slm.command_keys import PRECISIONS
from slm.errors import UserError
from slm.model.device import computing
from slm.pilot.answers import Inputs, evidence
from slm.pilot.arms import Arm, Training, Work, arms_of, train_arm
from slm.pilot.losses import HeldoutSet, evaluate_model
from slm.pilot.sample import Copies, Draw, draw, write_sample
from slm.pilot.verdict import BEFORE, REFERENCE, Evidence, Rules
from slm.score.command import load_reference, score
from slm.selection.names import ALL_TOKENS
from slm.store.documents import Documents
from slm.store.files import Json
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer
from slm.train.compose import Group, laid

log = logging.getLogger("slm.pilot")
CORPUS = "the corpus itself"  # the held-out set that is drawn from it
MOST_HELDOUT = 0.1  # of the corpus
LEAST_DOCUMENTS = 8  # fewer say nothing of how they scatter


class Parts:
    """The corpora of a pilot, and what is drawn from them."""

    def __init__(self, config: Any, batch: Mapping[str, int]):
        self.config, self.out = config, Path(config.out)
        self.corpus = Corpus.open(config.corpus)
        if self.corpus.num_windows == 0:
            raise UserError(f"{self.corpus.folder} holds no window of {self.corpus.seq_len} tokens")
        self.documents = Documents(self.corpus)
        self.curated = None if config.curated is None else Documents(Corpus.open(config.curated))
        self.tokens_per_step = batch["batch_size"] * self.corpus.seq_len
        sizes = np.diff(self.documents.bounds)
        pool = int(sizes.sum() - sizes[self.own_heldout.chosen].sum())
        self.steps = steps_of(config.budget, self.corpus, pool, self.tokens_per_step)

    @property
    def tokens(self) -> int:
        """That an arm sees."""
        return self.steps * self.tokens_per_step

    @cached_property
    def own_heldout(self) -> Draw:
        size = self.config.heldout_windows * self.corpus.seq_len + 1
        most = max(self.corpus.seq_len + 1, int(MOST_HELDOUT * self.corpus.num_targets))
        return draw(self.documents, min(size, most), [self.config.seed, 0], ())

    @cached_property
    def heldout(self) -> dict[str, Corpus]:
        """In domain, then elsewhere."""
        named = {**self.config.heldout, **(self.config.elsewhere or {})}
        return {name: Corpus.open(folder) for name, folder in named.items()}

    @cached_property
    def copies(self) -> Copies:
        return Copies(self.heldout)

    def draws(self, seed: int) -> tuple[Draw, list[Draw]]:
        """What the arms of a seed train on: the sample, and with the curated text in it."""
        key, draw = [self.config.seed, 1 + seed], self.copies.draw
        held = self.own_heldout.chosen.tolist()
        sample = draw(self.documents, self.tokens + 1, key, held)
        if self.curated is None:
            return sample, []
        rest = draw(self.documents, self.tokens + 1 - self.num_curated, key, held)
        return sample, [rest, draw(self.curated, self.num_curated, key, ())]

    @property
    def curated_share(self) -> float:
        assert self.curated is not None
        size = self.curated.corpus.num_targets
        return self.config.curated_share or size / (size + self.corpus.num_targets)

    @property
    def num_curated(self) -> int:
        """Tokens of the mixture; no more than there are."""
        assert self.curated is not None
        wanted = max(1, round(self.curated_share * self.tokens))
        return min(wanted, int(self.curated.bounds[-1]), self.tokens)


def steps_of(budget: int | str, corpus: Corpus, pool: int, tokens_per_step: int) -> int:
    """Optimizer steps of an arm. pool: tokens of the documents that are not held out"""
    tokens = budget
    if isinstance(budget, str):
        tokens = int(float(budget.removesuffix("%")) / 100 * corpus.num_targets)
    steps = min(int(tokens), pool - 1) // tokens_per_step
    if steps < 1:
        raise UserError(
            f"budget={budget} is {int(tokens):,} of the {corpus.num_targets:,} tokens of "
            f"{corpus.folder}, of which an arm can have {pool:,}: less than one optimizer step of "
            f"{tokens_per_step:,}"
        )
    return steps


# ---- what is measured ---------------------------------------------------------------------------


class Trials:
    """The arms that are there so far; `look` trains what is missing."""

    def __init__(
        self, config: Any, sets: Mapping[str, HeldoutSet], parts: Parts, groups: Mapping[str, Group]
    ):
        self.config, self.parts, self.work = config, parts, Work(parts.out / "clock.json")
        ratios = sorted(set(config.select_ratios))
        shape = (config.seeds, config.max_seeds, config.level, config.margin)
        self.rules = Rules(ratios, *shape, config.curated is not None)
        self.arms = {arm.name: arm for arm in arms_of(ratios, self.rules.has_mixed)}
        own = write_sample([parts.own_heldout], parts.out / "heldout")
        self.sets = {**sets, CORPUS: HeldoutSet(CORPUS, own, config.heldout_windows)}
        sizes = (parts.tokens, parts.tokens_per_step)
        elsewhere = [name for name in self.sets if name not in config.heldout]
        self.training = Training(*sizes, groups, self.sets, elsewhere, config.modules)
        self.precision = PRECISIONS[laid("trainer", groups["trainer"], ["default"])["precision"]]
        self.records: dict[tuple[str, int], Json] = {}
        self.sampled: dict[int, Json] = {}

    def look(self, seeds: Mapping[str, int]) -> Evidence:
        for number in range(max(seeds.values())):
            for name, count in seeds.items():
                if number < count and (name, number) not in self.records:
                    self.run(self.arms[name], number)
        return evidence(self.inputs(seeds), self.rules)

    def run(self, arm: Arm, number: int) -> None:
        place = self.parts.out / f"seed-{number}"
        if number not in self.sampled:
            self.sampled[number] = self.prepare(number, place)
        seed = self.config.seed + number
        self.records[arm.name, number] = train_arm(arm, seed, place, self.training, self.work)
        self.work.save()
        first = next(iter(self.sets.values()))
        nats = first.read(place / arm.folder, self.parts.tokens)[first.live].mean()
        log.info("seed %d, %s: %s %.4f nats", seed, arm.name, first.name, nats)

    def prepare(self, number: int, place: Path) -> Json:
        """Sample and mixture of a seed, and the scores of the sample."""
        sample, mixed = self.parts.draws(number)
        write_sample([sample], place / "sample")
        if mixed:
            write_sample(mixed, place / "mixture")
        if not (place / "references" / "manifest.json").exists():
            with self.work.counted():
                score(
                    place / "sample",
                    place / "references",
                    reference_model=self.config.reference_model,
                    dtype=self.precision,
                    modules=self.config.modules,
                )
        return {"tokens": sample.num_tokens, "by_source": sample.by_source()}

    def reference(self) -> Path:
        folder = self.parts.out / "reference"
        if not all(one.path(folder, 0).exists() for one in self.sets.values()):
            with self.work.counted():
                where = (self.parts.corpus, "auto", self.precision)
                lm = load_reference(self.config.reference_model, *where)
                size = self.config.data["micro_batch_size"]
                with computing(lm.device, self.precision):
                    evaluate_model(lm, list(self.sets.values()), folder, size)
        return folder

    def inputs(self, seeds: Mapping[str, int]) -> Inputs:
        out = self.parts.out
        runs = {
            name: {s: out / f"seed-{s}" / self.arms[name].folder for s in range(count)}
            for name, count in seeds.items()
        }
        ends = {
            REFERENCE: dict.fromkeys(runs[ALL_TOKENS], self.reference()),
            BEFORE: dict.fromkeys(runs[ALL_TOKENS], runs[ALL_TOKENS][0]),
        }
        scored = [out / f"seed-{s}" / "references" for s in self.sampled]
        records = {key: self.records[key] for key in self.records if key[1] < seeds[key[0]]}
        names = [*self.config.heldout]
        return Inputs(
            *(self.sets, names, CORPUS, self.training.points(), runs, ends, scored, records),
            self.target_tokens,
        )

    @property
    def target_tokens(self) -> int:
        return self.config.target_tokens or self.parts.corpus.num_targets


# ---- held-out text ------------------------------------------------------------------------------


def heldout_sets(config: Any, parts: Parts) -> dict[str, HeldoutSet]:
    """In domain, then elsewhere: of documents that no seed trains on."""
    others = config.elsewhere or {}
    if others.keys() & config.heldout.keys() or CORPUS in {*others, *config.heldout}:
        raise UserError(
            f"heldout names {sorted(config.heldout)}, elsewhere {sorted(others)}: each set needs a "
            f"name of its own, and {CORPUS!r} is taken"
        )
    check_corpora(parts, parts.heldout)
    sets = {n: HeldoutSet(n, held, config.heldout_windows) for n, held in parts.heldout.items()}
    check_documents([sets[name] for name in config.heldout])
    for number in range(config.max_seeds):
        parts.draws(number)
    for name, count in parts.copies.left_out().items():
        if count:
            log.warning(
                f"{count} documents of the corpora stand in held-out set {name} and are left out "
                "of the samples; the target would train on them: `slm prepare exclude=...`"
            )
    return sets


def check_corpora(parts: Parts, corpora: Mapping[str, Corpus]) -> None:
    for name, corpus in corpora.items():
        check_same_tokenizer(
            f"held-out set {name} ({corpus.folder})", corpus, parts.corpus.folder, parts.corpus
        )
        if corpus.fingerprint == parts.corpus.fingerprint:
            raise UserError(
                f"held-out set {name} is {corpus.folder}, the corpus that the pilot trains on: "
                f"fingerprint {corpus.fingerprint}"
            )


def check_documents(sets: Sequence[HeldoutSet]) -> None:
    for one in sets:
        count = int(one.documents.max()) + 1
        if count < LEAST_DOCUMENTS:
            raise UserError(
                f"held-out set {one.name} ({one.corpus.folder}) has {count} documents in the "
                f"{len(one.chosen)} windows that are read, an interval needs {LEAST_DOCUMENTS}"
            )
