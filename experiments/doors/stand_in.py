"""What the examples train on where you have your own: real text as bytes, a reference, a model.

The corpus is general text, the reference a bigram model of curated text (GSM8K) from SLM_DATA
(../shared/data where it exists; experiments/fetch_data.py fetches the same files). A reference
model of yours scores a dataset with slm.integrations.datasets.score_dataset.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(os.environ.get("SLM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
VOCAB = 256


def text(name: str, size: int) -> Tensor:  # (size,)
    return torch.tensor(list((DATA / name).read_bytes()[:size]))


def bigram_logprob() -> Tensor:  # (256, 256): of a byte after another
    curated = text("curated/gsm8k_train.jsonl", 200_000)
    counts, one = torch.ones(VOCAB, VOCAB), torch.ones(1)
    counts.index_put_((curated[:-1], curated[1:]), one, accumulate=True)
    return (counts / counts.sum(1, keepdim=True)).log()


def batches(steps: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """input_ids, targets and reference_logprob, (rows, length) each, already shifted."""
    logprob, found = bigram_logprob(), []
    corpus = text("general/tinyshakespeare.txt", steps * rows * length + 1)
    for start in range(0, steps * rows * length, rows * length):
        inputs, targets = (corpus[start + i :][: rows * length].view(rows, length) for i in (0, 1))
        scores = logprob[inputs, targets]
        found.append({"input_ids": inputs, "targets": targets, "reference_logprob": scores})
    return found


def documents(count: int) -> list[dict[str, list[Any]]]:
    """input_ids, labels and reference_logprob of lines of text, beside their tokens."""
    logprob, rows = bigram_logprob(), []
    lines = (DATA / "general" / "tinyshakespeare.txt").read_bytes().split(b"\n\n")[:count]
    for line in lines:
        ids = torch.tensor(list(line))
        scores = [float("nan"), *logprob[ids[:-1], ids[1:]].tolist()]  # nothing precedes the first
        rows.append({"input_ids": list(line), "labels": list(line), "reference_logprob": scores})
    return rows


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)
