"""What a run will cost, said before it is paid; how often its evaluations fit into a share of it.

Evaluations whose interval is not given get SHARE of the run's compute: at most PARTS times in the
run and before it, on all windows that data.heldout_windows allows; where that is too much, less
often; where two times are too much, on fewer windows, which all measurements of the run then share.

Costs are counted in tokens of a forward pass. A training token counts as one that no rule selects,
whatever the rule is: so a share is never more than is said, and the runs of a sweep, which may
differ in their rule, are measured at the same steps on the same windows. So are runs that differ in
model.backward: the plan is of the exact one, and of a cheaper run it is a larger share, as is said.
"""

import logging
import time
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer

from slm.console import duration
from slm.model.flops import flops_per_token, forward_flops_per_token
from slm.store.windows import Batch, to_device
from slm.train.callbacks.base import Evaluation, datamodule_of, num_due
from slm.train.callbacks.checkpoints import Checkpoints
from slm.train.sharded import data_ranks

log = logging.getLogger("slm.train")
SHARE, PARTS = 0.1, Evaluation.parts
UNKNOWN_COST = 3.0  # of a training token: one forward, and twice that backward
TIMED_TOKENS = 2048  # whose forward tells how fast this machine is


class Plan(NamedTuple):
    """How often in the run (and once before it), on how many windows of a set at most."""

    parts: int
    windows: int


def plan(
    budget: float,
    times: Callable[[int], int],  # parts -> evaluations
    cost: Callable[[int], float],  # windows -> of one evaluation
    most_windows: int,
    fewer: bool,
) -> Plan:
    """fewer: windows may be left out, where the first and the last evaluation are too much."""
    for parts in range(PARTS, 0, -1):
        if times(parts) * cost(most_windows) <= budget:
            return Plan(parts, most_windows)
    if not fewer:
        return Plan(1, most_windows)
    fitting = bisect_right(range(1, most_windows), budget, key=lambda w: times(1) * cost(w))
    return Plan(1, max(1, fitting))


class Costs(Callback):
    """Plans the evaluations, and says what the run costs; before the other callbacks."""

    def __init__(self, timed: Batch):
        self.timed = timed
        self.windows: int | None = None  # what the run's first start has planned

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        # Before the strategy shards the parameters.
        seq_len, lms = datamodule_of(trainer).corpus.seq_len, (pl_module.lm, *pl_module.online)
        ratio = pl_module.selection.ratio(trainer.max_steps * pl_module.tokens_per_step // 2)
        forward, *online = (forward_flops_per_token(lm.model, seq_len) for lm in lms)
        self.planned = self.least = self.usual = UNKNOWN_COST
        if forward is not None:
            model, backward = pl_module.lm.model, pl_module.lm.backward
            asked = ((0.0, "exact"), (0.0, backward), (ratio or 1.0, backward))
            found = [(flops_per_token(model, seq_len, *one) or 0) / forward for one in asked]
            self.planned, self.least, self.usual = found
            self.usual += sum(flops or 0 for flops in online) / forward
        parameters = list(pl_module.lm.parameters())
        self.model_bytes = sum(p.nbytes for p in parameters)
        self.trained_bytes = sum(p.nbytes for p in parameters if p.requires_grad)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        evaluations = [item for item in trainer.callbacks if isinstance(item, Evaluation)]  # type: ignore[attr-defined]
        planned = [item for item in evaluations if item.planned and item.every_tokens is None]
        data = datamodule_of(trainer)
        total = trainer.max_steps * data.tokens_per_step
        largest = max((held.num_windows for held in data.heldout.values()), default=0)
        allowed = min(data.heldout_windows, largest)
        if planned:
            self._plan(trainer, planned, total * self.planned * SHARE / (1 - SHARE))
        read = {
            item.what: item.times(trainer, item.parts)
            * item.num_tokens(trainer, data.heldout_windows)
            for item in evaluations
        }
        token_s = forward_seconds(pl_module, trainer, self.timed)
        left = total - trainer.global_step * data.tokens_per_step
        log.info(
            "%s steps of %s tokens, %s in all: about %s of training%s",
            f"{trainer.max_steps:,}",
            f"{data.tokens_per_step:,}",
            f"{total:,}",
            duration(left * self.usual * token_s / data_ranks(trainer).count),
            "" if left == total else " are left",
        )
        self._say_evaluation(trainer, evaluations, read, total, token_s)
        if data.heldout and data.heldout_windows < allowed:
            log.info(
                "of each held-out set %d windows are read, not %d (data.heldout_windows): else the "
                "first and the last measurement alone would take more than %.0f%% of the run; "
                "callbacks.heldout.every_tokens sets another interval, and reads all",
                *(data.heldout_windows, allowed, 100 * SHARE),
            )
        self._say_bytes(trainer, pl_module)

    def _plan(self, trainer: Trainer, planned: list[Evaluation], budget: float) -> None:
        """A run that goes on keeps its windows; one of a build without plans had all of them."""
        data, is_new = datamodule_of(trainer), trainer.global_step == 0 and self.windows is None
        if self.windows is not None:
            data.heldout_windows = min(data.heldout_windows, self.windows)
        made = plan(
            budget,
            lambda parts: planned[0].times(trainer, parts),
            lambda windows: sum(item.num_tokens(trainer, windows) for item in planned),
            data.heldout_windows,
            is_new,
        )
        self.windows = data.heldout_windows = made.windows
        for item in planned:
            item.parts = made.parts
            item.take_at_most(made.windows)

    def _say_evaluation(
        self,
        trainer: Trainer,
        evaluations: list[Evaluation],
        read: dict[str, int],
        total: int,
        token_s: float,
    ) -> None:
        often = sorted({item.times(trainer, item.parts) for item in evaluations})
        each, tokens = {what: count for what, count in read.items() if count}, sum(read.values())
        of_what = ", ".join(f"{what} {count:,}" for what, count in each.items())
        log.info(
            "evaluation: %s times, %s tokens%s: at most %.1f%% of the run's compute, about %s",
            " and ".join(map(str, often)) or "0",
            f"{tokens:,}",
            f" ({of_what})" if len(each) > 1 else "",
            100 * tokens / (tokens + total * self.least),
            duration(tokens * token_s / data_ranks(trainer).count),
        )

    def _say_bytes(self, trainer: Trainer, pl_module: Any) -> None:
        """Of AdamW's two moments; another optimizer may keep more or less."""
        for item in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(item, Checkpoints):
                each = self.model_bytes + 2 * self.trained_bytes
                kept = item.keep or 1 + num_due(trainer, item.every_tokens, item.parts)
                count = kept + (item.keep is not None) + (item.best_of is not None)
                log.info(
                    "checkpoints: about %s each, at most %d of them (with the one that is being "
                    "written): %s; model/: %s",
                    *(readable(each), count, readable(count * each), readable(self.model_bytes)),
                )

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self.windows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.windows = state_dict["windows"]


def readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


@torch.no_grad()
def forward_seconds(pl_module: Any, trainer: Trainer, batch: Batch) -> float:
    """Of a token, in evaluation mode; draws no random number. The first forward is slow."""
    lm, training, batch = pl_module.lm, pl_module.lm.training, to_device(batch, pl_module.device)
    lm.eval()
    # A compilation is not worth it.
    with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            start = time.perf_counter()
            lm(batch).loss.sum().item()
            seconds = time.perf_counter() - start
    lm.train(training)
    return seconds / batch["targets"].numel()
