"""Pilots drawn from recorded arms: how often is the verdict another than the full result's?

    python replay.py out        writes out/results.csv and figure.png from out/pilots/

A replay is a pilot of 3 to 6 of the recorded seeds (fewer where there are fewer), in a random
order, on a random half of the held-out documents; it decides as `slm pilot` does, by its own
functions. `same arms` renames runs on all tokens of other seeds to random and excess: there nothing
differs, by construction. `documents alone` leaves out what seeds scatter by, as a bootstrap over
documents does by itself.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.dynamics.colours import PALETTE
from slm.dynamics.figure import Axis, Figure, Panel, Series
from slm.pilot.answers import judged
from slm.pilot.arms import arms_of
from slm.pilot.costs import Costs
from slm.pilot.losses import HeldoutSet, Measured, measured, with_base
from slm.pilot.statistics import Resampled
from slm.pilot.verdict import BEFORE, Evidence, Outcome, Rules, excess, random, sequential
from slm.report.paper.plots import draw
from slm.selection.names import ALL_TOKENS
from slm.store.shards import Corpus

K, SEEDS, MOST, REPLAYS, DRAWS = 0.6, 3, 6, 300, 1000
CHOICES = ("select", "mix", "all", "cannot tell")


class Bank(NamedTuple):
    pilot: str
    corpus: str  # whose held-out part is measured
    has_mixed: bool = False  # with the arm that has the curated text mixed in


BANKS = {
    "helps": Bank("helps", "tests"),
    "helps, beside the mixture": Bank("helps", "tests", has_mixed=True),
    "itself": Bank("itself", "noisy"),
    "nothing": Bank("nothing", "noisy"),
}


class DocumentsAlone(Resampled):
    def luck(self, each: np.ndarray) -> np.ndarray:
        return np.zeros(self.draws)


KINDS = {"seeds and documents": Resampled, "documents alone": DocumentsAlone}


def read(out: Path, bank: Bank) -> tuple[Measured, dict[str, Any]]:
    folder = out / "pilots" / bank.pilot
    found = json.loads((folder / "pilot.json").read_text())
    held = HeldoutSet("held", Corpus.open(out / "corpora" / bank.corpus / "heldout"), 192)
    seeds = range(found["seeds"][ALL_TOKENS])
    runs = {
        arm.name: {seed: folder / f"seed-{seed}" / arm.folder for seed in seeds}
        for arm in arms_of([K], bank.has_mixed)
    }
    return measured(held, runs, found["curves"]["tokens_seen"]), found


def costs_in(found: Mapping[str, Any]) -> dict[float, Costs | None]:
    return {K: Costs(**found["to_equal_loss"][0]["flops"]["counted"])}


def some(found: Measured, of: Mapping[str, list[int]], documents: np.ndarray) -> Measured:
    """Of each arm these seeds, numbered anew; of the documents these."""
    nats = {
        arm: {number: found.nats[arm][seed][:, documents] for number, seed in enumerate(seeds)}
        for arm, seeds in of.items()
    }
    return found._replace(targets=found.targets[documents], nats=nats)


def drawn(found: Measured, generator: np.random.Generator, same: bool) -> Measured:
    count = len(found.targets)
    documents = np.sort(generator.choice(count, count // 2, replace=False))
    order = generator.permutation(len(found.nats[ALL_TOKENS])).tolist()
    if not same:
        return some(found, dict.fromkeys(found.nats, order[:MOST]), documents)
    parts = {arm: order[i * SEEDS : (i + 1) * SEEDS] for i, arm in enumerate(found.nats)}
    renamed = {arm: found.nats[ALL_TOKENS] for arm in found.nats}
    return some(found._replace(nats=renamed), parts, documents)


def look(
    found: Measured, rules: Rules, costs: Any, tokens: int, kind: Any, seeds: Mapping[str, int]
) -> Evidence:
    few = {arm: {s: of[s] for s in range(seeds[arm])} for arm, of in found.nats.items()}
    drawn = kind(with_base(found._replace(nats=few), BEFORE, ALL_TOKENS), draws=DRAWS)
    return judged(drawn, rules, costs, tokens)


def decided(found: Measured, rules: Rules, costs: Any, tokens: int, kind: Any) -> Outcome:
    return sequential(rules, list(found.nats), partial(look, found, rules, costs, tokens, kind))


def replays(
    found: Measured, record: Mapping[str, Any], bank: Bank, level: float, same: bool, kind: Any
) -> Iterator[Outcome]:
    generator = np.random.default_rng(0)
    most = SEEDS if same else min(MOST, len(found.nats[ALL_TOKENS]))
    rules = Rules([K], SEEDS, most, level, 0.01, bank.has_mixed)
    for _ in range(REPLAYS):
        one = drawn(found, generator, same)
        yield decided(one, rules, costs_in(record), record["target_tokens"], kind)


def row(name: str, level: float, truth: str, outcomes: list[Outcome], of: str) -> dict[str, Any]:
    counts = Counter(one.verdict.choice for one in outcomes)
    apart = [one.evidence.answer(excess(K), random(K)) in ("better", "worse") for one in outcomes]
    used = [max(one.seeds.values()) for one in outcomes]
    return {
        "bank": name,
        "interval": of,
        "level": level,
        "full_result": truth,
        "replays": len(outcomes),
        **{choice: counts[choice] / len(outcomes) for choice in CHOICES},
        "excess_unlike_random": sum(apart) / len(outcomes),
        "seeds": sum(used) / len(used),
    }


def results(out: Path) -> list[dict[str, Any]]:
    rows = []
    for name, bank in BANKS.items():
        found, record = read(out, bank)
        truth, of_truth = found, record
        if (out / "pilots" / f"{bank.pilot}_full").exists():
            truth, of_truth = read(out, bank._replace(pilot=f"{bank.pilot}_full"))
        whole = at_once(truth, of_truth, bank)
        say(f"{name}: all seeds, all documents", at_once(found, record, bank))
        say(f"{name}: full result, {truth.seen[-1]:,} tokens an arm", whole)
        for level in (0.05, 0.2):
            several = [*replays(found, record, bank, level, False, Resampled)]
            rows.append(row(name, level, whole.verdict.choice, several, "seeds and documents"))
        for words, kind in KINDS.items() if name == "helps" else ():
            same = [*replays(found, record, bank, 0.05, True, kind)]
            rows.append(row("same arms", 0.05, "nothing differs", same, words))
    return rows


def at_once(found: Measured, record: Mapping[str, Any], bank: Bank) -> Outcome:
    """With one look, at all that there is."""
    count = len(found.nats[ALL_TOKENS])
    rules = Rules([K], count, count, 0.05, 0.01, bank.has_mixed)
    return decided(found, rules, costs_in(record), record["target_tokens"], Resampled)


def say(what: str, outcome: Outcome) -> None:
    print(f"{what}: {outcome.verdict.choice}")
    for pair, found in outcome.evidence.intervals.items():
        print(
            f"  {' minus '.join(pair)}: {found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        )


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a verdict, of pilots at the command's level of 0.05."""
    rows = [row for row in rows if float(row["level"]) == 0.05]
    usual = rows[0]["interval"]
    names = [r["bank"] + ("" if r["interval"] == usual else f", {r['interval']}") for r in rows]
    names = [name.replace(", ", ",\n") for name in names]
    series = [
        Series(choice, PALETTE[i], names, np.array([float(r[choice]) for r in rows]), kind="bars")
        for i, choice in enumerate(CHOICES)
    ]
    axes = Axis("", "bank"), Axis("share of replayed pilots", "share", "share", from_zero=True)
    draw(Figure("Verdicts at level 0.05", [Panel("", *axes, series)], size=(9, 5)), path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    table = results(folder)
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    figure(table, folder / "figure.png")
    for line in table:
        print(line)
