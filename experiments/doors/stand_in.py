"""What the examples train on where you have your own: real text as bytes, a reference, a model.

The text is what every Python brings: the corpus is source of its standard library, the reference a
bigram model of its language reference. A reference model of yours scores a dataset with
slm.integrations.datasets.score_dataset.
"""

import argparse
import inspect
import typing
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 256


def curated() -> list[str]:
    """The language reference, by topic."""
    return [topics[name] for name in sorted(topics)]


def corpus() -> bytes:
    return (inspect.getsource(argparse) + inspect.getsource(typing)).encode()


def bigram_logprob() -> Tensor:  # (256, 256): of a byte after another
    text = torch.tensor(list("".join(curated()).encode()))
    counts, one = torch.ones(VOCAB, VOCAB), torch.ones(1)
    counts.index_put_((text[:-1], text[1:]), one, accumulate=True)
    return (counts / counts.sum(1, keepdim=True)).log()


def batches(steps: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """input_ids, targets and reference_logprob, (rows, length) each, already shifted."""
    logprob, found = bigram_logprob(), []
    text = torch.tensor(list(corpus())[: steps * rows * length + 1])
    for start in range(0, steps * rows * length, rows * length):
        inputs, targets = (text[start + i :][: rows * length].view(rows, length) for i in (0, 1))
        scores = logprob[inputs, targets]
        found.append({"input_ids": inputs, "targets": targets, "reference_logprob": scores})
    return found


def documents(count: int) -> list[dict[str, list[Any]]]:
    """input_ids, labels and reference_logprob of paragraphs of text, beside their tokens."""
    logprob, rows = bigram_logprob(), []
    for line in [line[:256] for line in corpus().split(b"\n\n") if line][:count]:
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
