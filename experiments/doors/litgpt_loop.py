"""LitGPT's GPT in a loop of your own, trained on the 60% of bytes that gain most over a reference.

    PYTHONPATH=.venv/doors python experiments/doors/litgpt_loop.py [steps]

The reference is a bigram model of the curated text in SLM_DATA (../shared/data where it exists),
the corpus general text. Only the loss differs from plain training, and the scores that it is given.
To keep LitGPT's own `pretrain` instead, see slm.integrations.litgpt. Seconds on a CPU.
"""

import os
import sys
from pathlib import Path

import torch
from litgpt import GPT, Config

from slm_kernels import selective_cross_entropy_from_logits

DATA = Path(os.environ.get("SLM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ROWS, LENGTH = 8, 64


def read(name: str, size: int) -> torch.Tensor:  # (size,)
    return torch.tensor(list((DATA / name).read_bytes()[:size]))


def bigram_logprob(text: torch.Tensor) -> torch.Tensor:  # (256, 256): of a byte after another
    counts = torch.ones(256, 256).index_put_((text[:-1], text[1:]), torch.ones(1), accumulate=True)
    return (counts / counts.sum(1, keepdim=True)).log()


def main(steps: int) -> None:
    torch.manual_seed(0)
    reference = bigram_logprob(read("curated/gsm8k_train.jsonl", 200_000))
    corpus = read("general/tinyshakespeare.txt", steps * ROWS * LENGTH + 1)
    model = GPT(Config(block_size=LENGTH, padded_vocab_size=256, n_layer=2, n_head=2, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        start = step * ROWS * LENGTH
        input_ids = corpus[start : start + ROWS * LENGTH].view(ROWS, LENGTH)
        targets = corpus[start + 1 : start + 1 + ROWS * LENGTH].view(ROWS, LENGTH)
        reference_logprob = reference[input_ids, targets]  # you would read it from your shards
        out = selective_cross_entropy_from_logits(
            model(input_ids), targets, -reference_logprob, select_ratio=0.6
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_all = out.token_loss.mean()
        print(
            f"step {step + 1}: {out.num_selected} of {targets.numel()} tokens, "
            f"loss {out.loss:.3f}, over all tokens {loss_all:.3f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
