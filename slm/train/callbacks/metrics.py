"""How far, how fast and how well a run goes: step metrics, the progress bar, model FLOPs.

Every metric is a value of the step that it is logged for, never an average over steps, so that an
interrupted and continued run logs what the uninterrupted one logs (perf/ apart).

Lightning's bars count micro-batches and read every logged metric back; these count optimizer steps
and show the numbers that `send` hands them.
"""

import resource
import statistics
import sys
import time
import warnings
from collections import deque
from functools import cache
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from slm.model.flops import flops_per_token, forward_flops_per_token
from slm.selection.books import loss_metrics, source_metrics, token_metrics
from slm.train.callbacks.base import RewindableLogger, datamodule_of, send, step_ended
from slm.train.sharded import data_ranks

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
# Lightning 2.6 lists H200 and NVL boards with sparsity, at twice what a dense matmul can reach.
# The H200 computes like the H100 SXM; NVL boards stay unknown.
H200_DENSE = {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 66.9e12}
H200_TF32 = 494.7e12


# ---- the bar ----------------------------------------------------------------------------------


# ---- model FLOPs utilisation ------------------------------------------------------------------


class Peak(NamedTuple):
    """What one device can do at most, and how we know."""

    flops_per_s: float | None
    source: str


def peak_flops(device: torch.device, precision: str) -> Peak:
    """Dense matmul rate of `device` under a Lightning precision such as bf16-mixed."""
    dtype = DTYPES[precision.split("-")[0]]
    if device.type == "cpu":
        return measured_peak(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return Peak(None, f"unknown for {device.type}")
    name = torch.cuda.get_device_name(device)
    return Peak(listed_flops(device, name, dtype), f"data sheet, dense {dtype}: {name}")


def listed_flops(device: torch.device, name: str, dtype: torch.dtype) -> float | None:
    if "NVL" in name:
        return None
    if "H200" in name and dtype in H200_DENSE:
        tf32 = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return H200_TF32 if tf32 else H200_DENSE[dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unlisted device is no news: mfu is absent
        return get_available_flops(device, dtype)


@cache  # the jobs of a sweep divide by one number
def measured_peak(
    dtype: torch.dtype, num_threads: int, size: int = 512, limit_s: float = 0.15
) -> Peak:
    """The fastest of the square matmuls that fit into limit_s: no data sheet speaks of CPUs."""
    a = torch.ones(size, size, dtype=dtype)  # no random numbers: the run's state must not move
    torch.mm(a, a)
    best_s, end = float("inf"), time.perf_counter() + limit_s
    while (start := time.perf_counter()) < end:
        torch.mm(a, a)
        best_s = min(best_s, time.perf_counter() - start)
    source = f"measured here: {size}x{size} matmul, {dtype}, {num_threads} threads"
    return Peak(2 * size**3 / best_s, source)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory ever held: of the GPU's allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # Linux counts KiB


# ---- metrics ----------------------------------------------------------------------------------


def ranked_together(scope: str, trainer: Trainer) -> dict[str, Any]:
    """How many windows a ranking is made among: masks of other splits differ but for one."""
    micro = datamodule_of(trainer).micro_batch_size
    windows = {"sequence": 1, "batch": micro, "global": micro * data_ranks(trainer).count}
    return {"scope": scope, "windows": windows[scope]}


class Metrics(Callback):
    """Logs every `every_steps`-th optimizer step and the last; the first of the callbacks.

    perf/step_s is the wall time of a step (reading, computing, updating), the median of the last
    `every_steps`, of nine where those are fewer. A step begins where the callbacks of the step
    before have ended (`StepClock`), so evaluations, probes and checkpoints do not count, here and
    in train_seconds.
    """

    def __init__(self, every_steps: int):
        self.every_steps = every_steps
        self.train_seconds = 0.0  # over the whole run
        self.recent_s: deque[float] = deque(maxlen=max(every_steps, 9))

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        # Before the strategy shards the parameters.
        seq_len, lm = datamodule_of(trainer).corpus.seq_len, pl_module.lm
        self.flops_unselected = flops_per_token(lm.model, seq_len, 0.0, lm.backward)
        self.flops_selected = flops_per_token(lm.model, seq_len, 1.0)
        scoring = [forward_flops_per_token(lm.model, seq_len) for lm in pl_module.online]
        self.flops_online = None if None in scoring else sum(filter(None, scoring))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.peak = peak_flops(pl_module.device, str(trainer.precision))
        for logger in trainer.loggers:
            if isinstance(logger, RewindableLogger) and trainer.global_step > 0:
                logger.truncate_after(trainer.global_step)
            facts = {
                "flops_per_token_selected": self.flops_selected,
                "flops_per_token_unselected": self.flops_unselected,
                "flops_per_token_online_reference": self.flops_online,
            } | self.peak._asdict()
            ranking = ranked_together(pl_module.selection.scope, trainer)
            logger.log_hyperparams({"mfu": facts, "ranking": ranking})
        self.ended_s = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.lr = optimizer.param_groups[0]["lr"]  # at the step's end it is the next step's

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_ended(trainer, batch_idx):
            return
        now_s = time.perf_counter()
        self.recent_s.append(now_s - self.ended_s)
        self.train_seconds += now_s - self.ended_s
        self.ended_s = now_s
        step = trainer.global_step
        if step % self.every_steps == 0 or step == trainer.max_steps:
            result = pl_module.step_result()
            metrics = loss_metrics(result) | token_metrics(result.tokens)
            metrics |= source_metrics(result.tokens, datamodule_of(trainer).windows)
            metrics |= {"train/lr": self.lr, "data/tokens_selected": pl_module.tokens_selected}
            # The median: the first steps of a run or of a process are slow.
            step_s = statistics.median(self.recent_s)
            trained = result.sums["num_trained"] / datamodule_of(trainer).tokens_per_step
            send(trainer, metrics | self._speed(trainer, pl_module.device, step_s, trained))

    def flops(self, tokens_seen: float, tokens_trained: float) -> float | None:
        """Of a training of so many tokens, of which some had a weight; of its online reference.

        None where it is not known what a token costs.
        """
        unselected, selected, online = self.flops_unselected, self.flops_selected, self.flops_online
        if unselected is None or selected is None or online is None:
            return None
        return tokens_seen * (unselected + online) + tokens_trained * (selected - unselected)

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds = state_dict["train_seconds"]

    def _speed(
        self, trainer: Trainer, device: torch.device, step_s: float, trained: float
    ) -> dict[str, float]:
        """Of the whole job, but memory: of this rank. trained: share of tokens with a weight."""
        tokens_per_s = datamodule_of(trainer).tokens_per_step / step_s
        speed = {
            "perf/step_s": step_s,
            "perf/tokens_per_s": tokens_per_s,
            "perf/peak_memory_bytes": peak_memory_bytes(device),
        }
        flops = self.flops(tokens_per_s, tokens_per_s * trained)
        if self.peak.flops_per_s is not None and flops is not None:
            speed["perf/mfu"] = flops / (self.peak.flops_per_s * trainer.world_size)
        return speed


class StepClock(Callback):
    """The last of the callbacks: from here on time counts to the next step."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.metrics.ended_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if step_ended(trainer, batch_idx):
            self.metrics.ended_s = time.perf_counter()
