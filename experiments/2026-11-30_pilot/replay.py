"""Pilots drawn from recorded arms: how often is the verdict another than the full result's?

    python replay.py out        writes out/results.csv and figure.png from out/pilots/

A replay is a pilot of 3 to 6 of the recorded seeds, in a random order, on a random half of the
held-out documents; it decides as `slm pilot` does, by its own functions. `same arms` renames runs
on all tokens of other seeds to random and excess: there nothing differs, by construction.
`documents alone` leaves out what seeds scatter by, as a bootstrap over documents does by itself.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.colours import PALETTE
from slm.dynamics.figure import Axis, Figure, Panel, Series
from slm.pilot.answers import judged
from slm.pilot.costs import Costs
from slm.pilot.losses import HeldoutSet, Measured, measured
from slm.pilot.statistics import Resampled
from slm.pilot.verdict import Evidence, Outcome, Rules, excess, random, sequential
from slm.report.paper.plots import draw
from slm.selection.names import ALL_TOKENS
from slm.store.shards import Corpus

K, SEEDS, MOST, REPLAYS, DRAWS = 0.6, 3, 6, 300, 1000
ARMS = {ALL_TOKENS: "all", random(K): f"random_{K}", excess(K): f"excess_{K}"}
CHOICES = ("select", "all", "cannot tell")
BANKS = {"helps": "tests", "cannot_help": "noisy"}  # and the corpus that is held out


class DocumentsAlone(Resampled):
    def luck(self, each: np.ndarray) -> np.ndarray:
        return np.zeros(self.draws)


KINDS = {"seeds and documents": Resampled, "documents alone": DocumentsAlone}


def read(out: Path, name: str, corpus: str) -> tuple[Measured, dict[str, Any]]:
    folder = out / "pilots" / name
    found = json.loads((folder / "pilot.json").read_text())
    held = HeldoutSet("held", Corpus.open(out / "corpora" / corpus / "heldout"), 192)
    seeds = range(found["seeds"][ALL_TOKENS])
    runs = {arm: {s: folder / f"seed-{s}" / place for s in seeds} for arm, place in ARMS.items()}
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
        return some(found, dict.fromkeys(ARMS, order[:MOST]), documents)
    parts = {arm: order[i * SEEDS : (i + 1) * SEEDS] for i, arm in enumerate(ARMS)}
    renamed = {arm: found.nats[ALL_TOKENS] for arm in ARMS}
    return some(found._replace(nats=renamed), parts, documents)


def look(
    found: Measured, rules: Rules, costs: Any, tokens: int, kind: Any, seeds: Mapping[str, int]
) -> Evidence:
    few = {arm: {s: of[s] for s in range(seeds[arm])} for arm, of in found.nats.items()}
    return judged(kind(found._replace(nats=few), draws=DRAWS), rules, costs, tokens)


def decided(found: Measured, rules: Rules, costs: Any, tokens: int, kind: Any) -> Outcome:
    return sequential(rules, list(ARMS), partial(look, found, rules, costs, tokens, kind))


def replays(
    found: Measured, record: Mapping[str, Any], level: float, same: bool, kind: Any
) -> Iterator[Outcome]:
    generator = np.random.default_rng(0)
    rules = Rules([K], SEEDS, SEEDS if same else MOST, level, 0.01, False)
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
    for name, corpus in BANKS.items():
        found, record = read(out, name, corpus)
        full, its_record = read(out, f"{name}_full", corpus)
        rules = Rules([K], SEEDS, SEEDS, 0.05, 0.01, False)
        whole = decided(full, rules, costs_in(its_record), record["target_tokens"], Resampled)
        for one, counted in (("pilot", found), ("full", full)):
            known = look(counted, rules, costs_in(record), 1, Resampled, seeds_of(counted))
            print(name, one, *known.intervals.items(), sep="\n  ")
        for level in (0.05, 0.2):
            several = [*replays(found, record, level, False, Resampled)]
            rows.append(row(name, level, whole.verdict.choice, several, "seeds and documents"))
        for kind, words in (
            (Resampled, "seeds and documents"),
            (DocumentsAlone, "documents alone"),
        ):
            same = [*replays(found, record, 0.05, True, kind)]
            rows.append(row(f"{name}, same arms", 0.05, "nothing differs", same, words))
    return rows


def seeds_of(found: Measured) -> dict[str, int]:
    return {arm: len(of) for arm, of in found.nats.items()}


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a verdict."""
    names = [f"{r['bank']}, level {r['level']}, {r['interval']}" for r in rows]
    series = [
        Series(choice, PALETTE[i], names, np.array([r[choice] for r in rows]), kind="bars")
        for i, choice in enumerate(CHOICES)
    ]
    axes = Axis("", "bank"), Axis("share of replayed pilots", "share", "share", from_zero=True)
    draw(Figure("Verdicts", [Panel("", *axes, series)], size=(9, 5)), path)


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
