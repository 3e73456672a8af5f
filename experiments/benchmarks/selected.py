"""A training step along selected rows against the all-token step: rows in results/selected.csv.

    python experiments/benchmarks/selected.py            8 and 30 layers, 12 minutes on two cores
    python experiments/benchmarks/selected.py --memory   the most bytes of tensors at once, k = 0.6
    python experiments/benchmarks/selected.py --profile  where the time goes: selected_profile.csv
    python experiments/benchmarks/selected.py --trainer  beside transformers' Trainer alone
    python experiments/benchmarks/selected.py --cpu      seconds of the process, on a busy machine
    python experiments/benchmarks/selected.py --bf16     products in bfloat16
    python experiments/benchmarks/selected.py --small    toy sizes, for the test suite

The shape of SmolLM2-135M (D = 576, V = 49,152, tied), float32, two windows of 512: forward,
selection by token losses, loss, backward; no optimizer. All are timed in turn within one loop, and
each row is a ratio of two seconds of one round. The first are of layers that keep what their
backward pass needs, and of a loss that keeps the logits; the next, with activation checkpointing,
keep no logits, and keys and values where the case says so. The last are of whole steps of
transformers' Trainer and of SelectiveTrainer, with clipping and AdamW. Of a busy machine the wall
time says nothing: there --cpu takes the seconds of the process on one thread, which the row's case
says. Bytes are the same on any machine: weights, gradients and all that is alive beside them.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pipeline import Rows, machine, ratios  # type: ignore
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainingArguments

from slm.integrations.transformers import SelectiveTrainer
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM, enable_checkpointing
from slm_kernels import select_top_k

RESULTS = Path(__file__).parent / "results" / "selected.csv"
LOGITS, KEYS = 2**27, 2**40  # bytes: of two windows' logits, and more than all keys
MOST = 0.6  # the most rows, and with them the most memory
TARGETS = {0.6: "< 0.80", 0.4: "< 0.66", 0.2: "< 0.52"}  # with 30 layers
RECOMPUTED = {0.6: "< 0.75", 0.4: "< 0.60"}
BESIDE_TRAINER = {0.6: "< 0.80", 0.4: "< 0.66"}


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


def make_batch(lm: SelectiveLM, windows: int, small: bool) -> dict[str, Any]:
    ids = torch.randint(0, lm.model.config.vocab_size, (windows, 33 if small else 513))
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "score": torch.rand(ids[:, 1:].shape)}


# ---- a step -------------------------------------------------------------------------------------


def forward(lm: SelectiveLM, batch: dict[str, Any], ratio: float, how: str) -> Tensor:
    """`how`: exact, selected, or selected with keys and values kept."""
    lm.backward, lm.keys_cache_bytes = how.split()[0], KEYS if "keys" in how else 0
    every, score = torch.ones_like(batch["score"], dtype=torch.bool), batch["score"]
    weight = every if ratio == 1 else lambda loss: select_top_k(score, every, ratio)
    return lm(batch, weight, takes_all=ratio == 1).loss


def step(lm: SelectiveLM, batch: dict[str, Any], bf16: bool, ratio: float, how: str) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = forward(lm, batch, ratio, how)
    loss.backward()
    lm.zero_grad(set_to_none=True)


def steps(
    lm: SelectiveLM,
    batch: dict[str, Any],
    checkpointed: bool,
    shares: Iterable[float],
    bf16: bool = False,
) -> dict[str, Callable[[], None]]:
    lm.logits_cache_bytes = 0 if checkpointed else LOGITS
    if checkpointed:
        enable_checkpointing(lm.model)
    hows = ("selected", "selected with keys kept") if checkpointed else ("exact", "selected")
    one = partial(step, lm, batch, bf16)
    cases = {f"{how} at k = {k}": partial(one, k, how) for k in shares for how in hows}
    return {"all tokens": partial(one, 1.0, "exact"), **cases}


def goal(layers: int, checkpointed: bool, case: str) -> str:
    if layers != 30 or case.startswith("exact") or (checkpointed and "keys" not in case):
        return ""
    return (RECOMPUTED if checkpointed else TARGETS)[float(case.split()[-1])]


# ---- time ---------------------------------------------------------------------------------------


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


def bench(rows: Rows, layers: int, given: argparse.Namespace) -> None:
    busy = ", bfloat16" * given.bf16
    busy += ", CPU time of one thread beside other processes" * given.cpu
    clock = time.process_time if given.cpu else time.perf_counter
    lm = make_lm(layers, given.small)
    batch = make_batch(lm, 2, given.small)
    if not given.trainer:
        bench_steps(rows, lm, batch, layers, busy, clock, given)
    for k in BESIDE_TRAINER if (layers == 30 or given.small) and not given.bf16 else ():
        with tempfile.TemporaryDirectory() as folder:
            cases = beside_trainer(make_lm(layers, given.small), batch, k, folder)
            found = in_turn(clock, given.repeats, cases)
        relative = ratios(found["SelectiveTrainer"], found["Trainer"])
        case = f"SelectiveTrainer, selected at k = {k} / Trainer, {layers} layers{busy}"
        rows.add("step", case, "1", relative, BESIDE_TRAINER[k])


def bench_steps(
    rows: Rows,
    lm: SelectiveLM,
    batch: dict[str, Any],
    layers: int,
    busy: str,
    clock: Callable[[], float],
    given: argparse.Namespace,
) -> None:
    for checkpointed, goals in ((False, TARGETS), (True, RECOMPUTED)):
        found = in_turn(clock, given.repeats, steps(lm, batch, checkpointed, goals, given.bf16))
        every = found.pop("all tokens")
        words = f"{layers} layers, {'checkpointed' if checkpointed else 'logits kept'}{busy}"
        for name, seconds in found.items():
            target = "" if given.bf16 else goal(layers, checkpointed, name)
            rows.add("step", f"{name} / all tokens, {words}", "1", ratios(seconds, every), target)
        rows.add("step", f"all tokens, {words}", "s", every, "")


def beside_trainer(
    lm: SelectiveLM, batch: dict[str, Any], ratio: float, folder: str
) -> dict[str, Callable[[], None]]:
    """Steps of transformers' own trainer and of ours, of one model and one optimizer's state."""
    columns = {name: batch["input_ids"] for name in ("input_ids", "labels")}
    scored = columns | {"reference_logprob": -batch["score"]}
    fields: dict[str, Any] = {
        "model": lm.model,
        "args": TrainingArguments(folder, report_to="none", use_cpu=True),
        "train_dataset": [{name: column[0] for name, column in scored.items()}],
    }
    plain = Trainer(**fields)
    ours = SelectiveTrainer(select_ratio=ratio, backward="selected", **fields)
    ours.optimizer = plain.create_optimizer()
    cases = {"Trainer": (plain, columns), "SelectiveTrainer": (ours, scored)}
    return {name: partial(trainer_step, *case) for name, case in cases.items()}


def trainer_step(trainer: Any, batch: dict[str, Tensor]) -> None:
    """As Trainer's inner loop takes it, without what is beside it: logs, callbacks, a schedule."""
    batches, count = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    trainer.training_step(trainer.model, batches[0], count)
    parameters = trainer.model.parameters()
    torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()


# ---- memory -------------------------------------------------------------------------------------


def peak_bytes(case: Callable[[], None]) -> int:
    """The most that is allocated at once, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        case()
    results: Any = found.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def bench_memory(rows: Rows, layers: int, given: argparse.Namespace) -> None:
    lm = make_lm(layers, given.small)
    batch = make_batch(lm, given.windows, given.small)
    weights = sum(parameter.nbytes for parameter in lm.parameters())
    for checkpointed in (False, True):
        cases = steps(lm, batch, checkpointed, (MOST,))
        peaks = {name: weights + peak_bytes(case) for name, case in cases.items()}
        words = f"{layers} layers, {given.windows} windows"
        words += ", checkpointed" if checkpointed else ", logits kept"
        every = peaks.pop("all tokens")
        rows.add("memory", f"all tokens, {words}", "MB", [every / 1e6], "")
        for name, peak in peaks.items():
            target = "< 1.05" if checkpointed else ""
            rows.add("memory", f"{name} / all tokens, {words}", "1", [peak / every], target)


# ---- profile ------------------------------------------------------------------------------------

GROUPS = {
    "products": ("mm", "addmm", "bmm", "addmv_", "_fused_"),
    "attention": ("_scaled_dot_product", "_flash"),
    "rows, copies and zeros": (
        "index", "gather", "scatter", "copy_", "fill_", "zero", "cat", "clone", "nonzero",
        "masked_fill",
    ),
    "softmax and logits": ("_softmax", "exp", "amax", "max"),
}  # fmt: skip


def group_of(operation: str) -> str:
    name = operation.removeprefix("aten::")
    found = [group for group, starts in GROUPS.items() if name.startswith(starts)]
    return found[0] if found else "elementwise and the rest"


def profiled(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it gives, and seconds of each group of operations."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        out = function()
        took = time.perf_counter() - start
    seconds: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        seconds[group_of(event.key)] += event.self_cpu_time_total / 1e6
    seconds["all"] = took
    return out, seconds


def bench_profile(layers: int, given: argparse.Namespace) -> None:
    """Medians of the repeats, beside those of the all-token step."""
    lm = make_lm(layers, given.small)
    batch, found = make_batch(lm, 2, given.small), defaultdict(list)
    lm.logits_cache_bytes = LOGITS
    for name in ("", "checkpointed "):
        if name:
            lm.logits_cache_bytes = 0
            enable_checkpointing(lm.model)
        for repeat in range(1 + given.repeats):
            for k in (1.0, *TARGETS):
                how = "exact" if k == 1 else "selected with keys kept" if name else "selected"
                loss, before = profiled(partial(forward, lm, batch, k, how))
                _, after = profiled(loss.backward)
                lm.zero_grad(set_to_none=True)
                for phase, seconds in (("forward", before), ("backward", after)):
                    for group, value in seconds.items() if repeat else ():
                        found[k, name + phase, group].append(value)
    path = given.out.with_name("selected_profile.csv")
    lines = [
        {"layers": layers, "k": k, "phase": phase, "group": group}
        | {"seconds": statistics.median(values), "repeats": len(values)}
        | machine()
        for (k, phase, group), values in found.items()
    ]
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(lines)
    for line in lines:
        print(*(line[name] for name in ("layers", "k", "phase", "group", "seconds")), sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="bytes, not seconds")
    parser.add_argument("--trainer", action="store_true", help="beside transformers' Trainer alone")
    parser.add_argument("--profile", action="store_true", help="seconds of groups of operations")
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--cpu", action="store_true", help="seconds of the process, one thread")
    parser.add_argument("--windows", type=int, default=2, help="of a micro-batch, with --memory")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, by autocast")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 30])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    given = parser.parse_args()
    if given.cpu:
        torch.set_num_threads(1)
    rows = Rows()
    for layers in [2] if given.small else given.layers:
        if given.profile:
            bench_profile(layers, given)
        else:
            (bench_memory if given.memory else bench)(rows, layers, given)
            rows.write(given.out)


if __name__ == "__main__":
    main()
