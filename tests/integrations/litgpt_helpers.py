"""LitGPT's own `pretrain.setup`, in a process of its own: it parses sys.argv and compiles."""

import json
import sys
from typing import Any

import torch
from litgpt import Config, pretrain
from litgpt.args import EvalArgs, TrainArgs

from slm.integrations.litgpt import SelectiveData, selective_pretraining

LR = 0.1


def tiny() -> Config:
    return Config(
        name="tiny", block_size=16, vocab_size=300, padded_vocab_size=300, n_layer=2, n_head=2,
        n_embd=32, bias=False, norm_class_name="RMSNorm", mlp_class_name="GptNeoxMLP",
    )  # fmt: skip


def main() -> None:
    """Train for three steps of two micro-batches of two windows; the first weights are saved."""
    settings = json.loads(sys.argv.pop())
    sys.argv = ["pretrain", "pythia-14m"]  # which LitGPT reads again as it saves
    stock_fit = pretrain.fit

    def fit(state: dict[str, Any], **others: Any) -> None:
        torch.save(state["model"].state_dict(), f"{settings['out']}/first.pth")
        stock_fit(state=state, **others)

    pretrain.fit = fit  # type: ignore[assignment]
    with selective_pretraining(**settings["selection"]):
        pretrain.setup(
            "pythia-14m",
            model_config=tiny(),
            out_dir=settings["out"],
            precision="32-true",
            data=SelectiveData(**settings["data"]),
            train=TrainArgs(
                global_batch_size=4, micro_batch_size=2, max_tokens=3 * 4 * 16, max_norm=1e9,
                lr_warmup_steps=0, min_lr=LR, save_interval=None, log_interval=1,
            ),
            eval=EvalArgs(interval=1, max_iters=2, final_validation=True),
            optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": LR}},
            devices=1,
            logger_name="csv",
        )  # fmt: skip
