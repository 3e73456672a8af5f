"""torchtitan's own Trainer on a CPU, for a process of its own: WITH_TITAN in test_torchtitan.py.

torchtitan asks torch for an accelerator and takes "cuda" where there is none. Told that it is the
CPU, everything runs but four things, which are replaced here: the memory statistics (torch.cpu has
none), the barrier that names devices and the scaled sum of gradients (gloo has neither; the scale
is 1) and FlexAttention (no backward pass on a CPU). Nobody waits two seconds at the end. Model (two
of its layers), FSDP, optimizer, training loop and validator are torchtitan's. The scores are the
unigram log-probs of the text's bytes, with NaN where a byte is a line's last.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan import trainer as titan_trainer
from torchtitan.components import metrics
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from slm.integrations.torchtitan import SelectiveChunkedLoss, SelectiveLoss, selective

LOSSES = {"chunked": SelectiveChunkedLoss.Config, "logits": SelectiveLoss.Config}


class NoMemoryStatistics:
    device_name = "cpu"

    def get_peak_stats(self) -> metrics.DeviceMemStats:
        return metrics.DeviceMemStats(0.0, 0.0, 0.0, 0.0, 0, 0)

    def reset_peak_stats(self) -> None:
        pass


metrics.build_device_memory_monitor = NoMemoryStatistics  # type: ignore[assignment]
titan_trainer.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)  # type: ignore
dist_utils.set_pg_timeouts = lambda **timeouts: None  # type: ignore[assignment]


def scored_bytes(path: str, size: int) -> tuple[Tensor, Tensor]:
    """(size,) the text's bytes, and their log-probs under a unigram model of the same text."""
    ids = torch.tensor(list(Path(path).read_bytes()[:size]))
    logprob = (ids.bincount(minlength=256) / len(ids)).log()[ids]
    return ids, logprob.masked_fill(ids == ord("\n"), torch.nan)


class Windows(BaseDataLoader):
    """Window n of the text in row n of the step, however rows are spread over ranks and calls."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True
        scored: bool = True
        sign: float = 1.0

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **others: Any,
    ):
        self.config, self.world_size, self.rank = config, dp_world_size, dp_rank
        self.seq_len, self.rows = seq_len, local_batch_size
        self.ids, self.logprob = scored_bytes(config.dataset_path or "", 100 * (seq_len + 1))

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for first in range(self.rank * self.rows, 100, self.world_size * self.rows):
            ids = self.ids.view(100, -1)[first : first + self.rows]
            inputs = {"input": ids[:, :-1]}
            if self.config.scored:
                logprob = self.logprob.view(100, -1)[first : first + self.rows, 1:]
                inputs["reference_logprob"] = self.config.sign * logprob
            yield inputs, ids[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    decode = get_vocab_size = encode  # type: ignore[assignment]


def trainer_config(
    text: str,
    out: str,
    loss: str = "chunked",
    select_ratio: float = 0.6,
    scope: str = "batch",
    num_chunks: int = 4,
    rows: int = 4,
    all_rows: int = 4,
    steps: int = 3,
    scored: bool = True,
    sign: float = 1.0,
    validate: bool = False,
    spmd_backend: str = "spmd_types",
) -> Trainer.Config:
    chosen = LOSSES[loss](select_ratio=select_ratio, scope=scope)
    if isinstance(chosen, SelectiveChunkedLoss.Config):
        chosen.num_chunks = num_chunks
    config = selective(llama3_debugmodel(), chosen)
    assert config.model_spec is not None
    model: Any = config.model_spec.model
    del model.layers[2:]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.dataloader = Windows.Config(dataset_path=text, scored=scored, sign=sign)
    config.tokenizer = NoTokenizer.Config()
    config.dump_folder = out + ".dump"
    config.training.local_batch_size, config.training.global_batch_size = rows, all_rows
    config.training.seq_len, config.training.steps = 32, steps
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True
    config.checkpoint.enable = False  # type: ignore[attr-defined]
    config.validator.enable, config.validator.steps, config.validator.freq = validate, 2, steps
    config.validator.dataloader = Windows.Config(dataset_path=text, scored=False)
    config.parallelism.spmd_backend = spmd_backend  # type: ignore[assignment]
    config.debug.seed, config.debug.enable_structured_logging = 0, False
    return config


def whole(values: list[Tensor]) -> list[Tensor]:
    return [(v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for v in values]


@torch.no_grad()
def set_weights(model: nn.Module, weights: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), weights, strict=True):
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def main() -> None:
    """Train, and save what was logged, the weights before and after, the last gradients (clipped).

    `start`: the file of another run, whose weights before training are taken
    """
    settings = json.loads(sys.argv[1])
    start = settings.pop("start", None)
    trainer = trainer_config(**settings).build()
    model, logged, validated = trainer.model_parts[0], [], []
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
    if start is not None:  # ranks draw other weights than one process does
        set_weights(model, torch.load(start)["before"])
    weights: list[Tensor] = list(model.parameters())
    before = whole(weights)
    trainer.metrics_processor.log = lambda step, mean, largest, norm, **others: logged.append(
        (mean, largest, norm)
    )
    trainer.metrics_processor.log_validation = lambda loss, step: validated.append(loss)
    over_all: list[dict[str, float]] = []
    trainer.metrics_processor.logger.log = lambda metrics, step: over_all.append(metrics)
    trainer.train()
    run = {"before": before, "logged": logged, "validated": validated}
    run["over_all"], run["after"] = over_all, whole(weights)
    run["gradients"] = whole([cast(Tensor, weight.grad) for weight in weights])
    if torch.distributed.get_rank() == 0:
        torch.save(run, settings["out"])
    trainer.close()
    torch.distributed.destroy_process_group()
