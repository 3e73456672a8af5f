"""What a step costs with either backward pass, and the tokens that this is worth -> costs.csv.

PYTHONPATH=../benchmarks python costs.py MODEL CORPUS REFERENCES TOKENS

FLOPs are the trainer's own (slm/model/flops.py). Seconds are of this machine and this model:
forward, selection by excess loss, backward, AdamW, all in turn within one loop. `smollm2_seconds`
is the ratio at SmolLM2-135M's shape, from ../benchmarks/results/selected.csv.
"""

import csv
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from selected import RESULTS, in_turn  # type: ignore  # ../benchmarks
from torch.optim import AdamW, Optimizer

from slm.model.build import SelectiveLM, load_model
from slm.model.flops import flops_per_token
from slm.selection.rules import Excess
from slm.store.files import write_csv
from slm.store.shards import Corpus
from slm.store.windows import Batch, Windows, open_windows, spread

RATIOS, WINDOWS, REPEATS = (0.6, 0.4, 0.2), 32, 9


def step(lm: SelectiveLM, optimizer: Optimizer, batch: Batch, ratio: float, backward: str) -> None:
    rule, lm.backward = Excess(ratio), backward
    weight, _ = rule.deferred(batch, 0)
    lm(batch, weight, takes_all=rule.takes_all(0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds(lm: SelectiveLM, batch: Batch) -> dict[str, np.ndarray]:
    """(repeats,) of each; at rate 0 the weights, and so the selections, stay."""
    run = partial(step, lm, AdamW(lm.parameters(), lr=0.0), batch)
    cases = {"all": partial(run, 1.0, "exact")} | {
        f"{backward} {k}": partial(run, k, backward)
        for k in RATIOS
        for backward in ("exact", "selected")
    }
    found = in_turn(time.perf_counter, REPEATS, cases)
    return {name: np.array(values) for name, values in found.items()}


def smollm2_seconds(ratio: float) -> float:
    """Selected over exact, both measured against the step on all tokens."""
    with open(RESULTS, newline="") as file:
        medians = {row["case"]: float(row["median"]) for row in csv.DictReader(file)}
    of = "{} at k = {} / all tokens, 30 layers, logits kept".format
    return medians[of("selected", ratio)] / medians[of("exact", ratio)]


def row(lm: SelectiveLM, windows: Windows, tokens: int, ratio: float, found: Any) -> dict[str, Any]:
    length = windows.corpus.seq_len
    every, exact, selected = (
        round(flops_per_token(lm.model, length, *of) or 0)
        for of in ((1.0, "exact"), (ratio, "exact"), (ratio, "selected"))
    )
    a_step = WINDOWS * length
    mine = {name: found[f"{name} {ratio}"] for name in ("exact", "selected")}
    return {
        "select_ratio": ratio,
        "tokens_at_equal_flops": round(tokens * exact / selected / a_step) * a_step,
        "all_tokens_flops_per_token": every,
        "exact_flops_per_token": exact,
        "selected_flops_per_token": selected,
        "selected_over_exact_flops": round(selected / exact, 4),
        "all_tokens_step_seconds": round(float(np.median(found["all"])), 4),
        **{f"{k}_over_all_seconds": ratio_of(v, found["all"]) for k, v in mine.items()},
        "selected_over_exact_seconds": ratio_of(mine["selected"], mine["exact"]),
        "selected_over_exact_smollm2_seconds": round(smollm2_seconds(ratio), 4),
    }


def ratio_of(one: np.ndarray, other: np.ndarray) -> float:
    return round(float(np.median(one / other)), 4)


def main() -> None:
    model, corpus, references, tokens = sys.argv[1:]
    windows = open_windows(Corpus.open(corpus, "size"), references, None)
    lm = SelectiveLM(load_model(model)).train()
    torch.manual_seed(0)
    found = seconds(lm, windows.batch(spread(len(windows), WINDOWS)))
    write_csv(Path("costs.csv"), [row(lm, windows, int(tokens), k, found) for k in RATIOS])


if __name__ == "__main__":
    main()
