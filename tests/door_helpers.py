"""What a step of any adapter must do, computed from all logits in float64; rows of real text."""

import copy
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainerCallback

import warm
from door_folder import DOORS
from model_helpers import ARCHITECTURES, VOCAB
from slm.model.architecture import new_model
from slm.model.attention import attention_through
from text_helpers import DATA

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, list[Any]]
ONE_STEP: dict[
    str, Any
] = {  # of transformers' TrainingArguments, with nothing between loss and update
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}


def make_model(name: str = "llama", **fields: Any) -> Any:
    """Weights larger than at initialisation, so that losses differ between tokens."""
    torch.manual_seed(0)
    model = new_model(ARCHITECTURES[name] | fields, VOCAB, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def make_rows(
    lengths: list[int], prompt: int = 0, unscored: int = 0, seed: int = 0, weighted: bool = False
) -> list[Row]:
    """Tokens, labels (-100 in the prompt) and scores (NaN at first, and `unscored` more); by wish
    weights, some of them 0."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for length in lengths:
        ids = generator.integers(2, VOCAB, length).tolist()
        scores = -generator.exponential(3.0, length).astype(np.float32)
        scores[: 1 + unscored] = np.nan
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "reference_logprob": scores.tolist()})
        if weighted:
            rows[-1]["token_weight"] = generator.choice([0.0, 0.25, 1.0, 3.5], length).tolist()
    return rows


def row_losses(model: Any, row: Row) -> tuple[Tensor, Tensor]:  # (T - 1,), (T - 1,)
    """Losses of the targets of one row alone, with gradient, and their excess; NaN: no candidate"""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    losses = F.cross_entropy(model(ids).logits[0, :-1], labels[1:], reduction="none")
    excess = losses.detach() + torch.tensor(row["reference_logprob"], dtype=torch.float64)[1:]
    return losses, excess.masked_fill((labels[1:] == -100) | (weights_of([row]) == 0), torch.nan)


def weights_of(group: list[Row]) -> Tensor:
    """What the losses of the targets of these rows are multiplied by, 1 without a column."""
    key = "token_weight"
    weights = [row[key] if key in row else [1.0] * len(row["labels"]) for row in group]
    return torch.cat([torch.tensor(one, dtype=torch.float64)[1:] for one in weights])


def group_losses(model: Any, group: list[Row]) -> tuple[Tensor, Tensor]:
    """Those of several rows, which are ranked together."""
    losses, excess = zip(*(row_losses(model, row) for row in group), strict=True)
    return torch.cat(losses), torch.cat(excess)


def top(excess: Tensor, ratio: float) -> Tensor:  # (N,) -> (N,) bool
    """The K highest by sorting a list; NaN is no candidate."""
    candidates = [i for i, value in enumerate(excess.tolist()) if value == value]
    count = min(max(int(ratio * len(candidates) + 0.5), 1), len(candidates))
    best = sorted(candidates, key=lambda i: (-excess[i].item(), i))[:count]
    selected = torch.zeros(len(excess), dtype=torch.bool)
    selected[best] = True
    return selected


def expected_gradients(
    model: Any, groups: list[list[Row]], ratio: float
) -> tuple[dict[str, Tensor], float, int]:
    """Gradients, loss and number selected of one step; tokens are ranked within each group."""
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        losses, excess = group_losses(exact, group)
        selected = top(excess, ratio)
        weighted = losses * weights_of(group)
        total, count = total + weighted[selected].sum(), count + int(selected.sum())
    (total / count).backward()
    return gradients_of(exact), (total / count).item(), count


def cut_gradients(model: Any, rows: list[Row], ratio: float) -> dict[str, Tensor]:
    """Those of one step along the selected tokens alone: others are constants as keys and values"""
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    selected = top(group_losses(exact, rows)[1], ratio)
    total = torch.zeros((), dtype=torch.float64)
    for row, mine in zip(rows, selected.split([len(r["labels"]) - 1 for r in rows]), strict=True):
        kept = F.pad(mine, (0, 1))[None, None, :, None]  # the last token predicts nothing

        def cut(own: Any, module: Any, query: Any, *pair: Any, kept: Any = kept, **kwargs: Any):
            key, value = (torch.where(kept, one, one.detach()) for one in pair[:2])
            return own(module, query, key, value, *pair[2:], **kwargs)

        with attention_through(cut):
            total = total + (row_losses(exact, row)[0] * weights_of([row]))[mine].sum()
    (total / selected.sum()).backward()
    return gradients_of(exact)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=2e-4, atol=1e-6, msg=name)


def dataset_of(rows: list[Any]) -> Any:
    return Dataset.from_list(rows)


class Recorder(TrainerCallback):
    """Gradients before every update; what was logged."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(gradients_of(kwargs["model"]))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


def make_tokenizer(side: str) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 61)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side=side,
    )


def padding(side: str = "right", **fields: Any) -> Any:
    """Pads ids and labels, as a collator with a tokenizer does."""
    return DataCollatorForSeq2Seq(make_tokenizer(side), label_pad_token_id=-100, **fields)


def real_texts(count: int) -> list[str]:
    """Questions with their answers."""
    lines = (DATA / "curated" / "gsm8k_train.jsonl").read_text().splitlines()[:count]
    return ["{question}\n{answer}".format(**json.loads(line)) for line in lines]


def run_python(*arguments: str, doors: bool = False, timeout: int = 120) -> str:
    """A process from the repository root; `doors`: with the trainers of tests/doors.txt."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    if doors:
        assert DOORS.is_dir(), f"{DOORS} is missing: `make .venv/.installed` makes it"
        paths.append(str(DOORS))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *arguments]
    done = warm.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_of(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"\bloss'?:? '?(\d+\.\d+)", output)]


def assert_loss_falls(output: str) -> None:
    losses = losses_of(output)
    assert len(losses) >= 10 and losses[-1] < losses[0] - 0.2, output


def run_on_ranks(script: str, folder: Path) -> None:
    """Two processes of a test's own file, which is given a folder for what they find."""
    command = [sys.executable, "-W", "ignore", script, str(folder)]
    codes, said = warm.run_ranks(2, command)
    assert codes == [0, 0], said
