"""A training step along selected rows against the all-token step: rows in results/selected.csv.

    python experiments/benchmarks/selected.py            8 and 30 layers, 15 minutes on two cores
    python experiments/benchmarks/selected.py --cpu      seconds of the process, on a busy machine
    python experiments/benchmarks/selected.py --small    toy sizes, for the test suite

The shape of SmolLM2-135M (D = 576, V = 49,152, tied), float32, two windows of 512: forward,
selection by token losses, loss, backward; no optimizer. All are timed in turn within one loop, and
each row is a ratio of two seconds of one round. The first are of layers that keep what their
backward pass needs, the last of activation checkpointing. Of a busy machine the wall time says
nothing: there --cpu takes the seconds of the process on one thread, which the row's case says.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipeline import Rows, ratios  # type: ignore

from slm.model.architecture import new_model
from slm.model.build import SelectiveLM, enable_checkpointing
from slm_kernels import select_top_k

RESULTS = Path(__file__).parent / "results" / "selected.csv"
TARGETS = {0.6: "< 0.80", 0.4: "< 0.66", 0.2: "< 0.52"}  # with 30 layers
RECOMPUTED = {0.6: "< 0.75", 0.4: "< 0.60", 0.2: ""}


def make_lm(layers: int, small: bool) -> SelectiveLM:
    fields = {
        "model_type": "llama",
        "hidden_size": 48 if small else 576,
        "intermediate_size": 128 if small else 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 3 if small else 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    return SelectiveLM(new_model(fields, 512 if small else 49152, None)).train()


def step(lm: SelectiveLM, batch: dict[str, Any], ratio: float, backward: str) -> None:
    lm.backward = backward
    every, score = torch.ones_like(batch["score"], dtype=torch.bool), batch["score"]
    weight = every if ratio == 1 else lambda loss: select_top_k(score, every, ratio)
    lm(batch, weight, takes_all=ratio == 1).loss.backward()
    lm.zero_grad(set_to_none=True)


def in_turn(
    clock: Callable[[], float], repeats: int, cases: dict[str, Callable[[], None]]
) -> dict[str, list[float]]:
    """Seconds of each; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(1 + repeats):
        for name, case in cases.items():
            start = clock()
            case()
            seconds[name].append(clock() - start)
    return {name: found[1:] for name, found in seconds.items()}


def bench(rows: Rows, layers: int, repeats: int, small: bool, on_cpu: bool) -> None:
    how = ", CPU time of one thread beside other processes" if on_cpu else ""
    clock = time.process_time if on_cpu else time.perf_counter
    lm = make_lm(layers, small)
    ids = torch.randint(0, lm.model.config.vocab_size, (2, 33 if small else 513))
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "score": torch.rand(ids[:, 1:].shape)}
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(lm.model)
        cases: dict[str, Callable[[], None]] = {"all": partial(step, lm, batch, 1.0, "exact")}
        for k in TARGETS:
            for backward in ("selected",) if checkpointed else ("exact", "selected"):
                cases[f"{backward} {k}"] = partial(step, lm, batch, k, backward)
        found = in_turn(clock, repeats, cases)
        word = ", checkpointed" if checkpointed else ""
        for name in list(cases)[1:]:
            backward, k = name.split()
            goals = (RECOMPUTED if checkpointed else TARGETS) if layers == 30 else {}
            goal = goals[float(k)] if goals and backward == "selected" else ""
            case = f"{backward} at k = {k} / all tokens, {layers} layers{word}{how}"
            rows.add("step", case, "1", ratios(found[name], found["all"]), goal)
        rows.add("step", f"all tokens, {layers} layers{word}{how}", "s", found["all"], "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--cpu", action="store_true", help="seconds of the process, one thread")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 30])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    arguments = parser.parse_args()
    if arguments.cpu:
        torch.set_num_threads(1)
    rows = Rows()
    for layers in [2] if arguments.small else arguments.layers:
        bench(rows, layers, arguments.repeats, arguments.small, arguments.cpu)
        rows.write(arguments.out)


if __name__ == "__main__":
    main()
