"""LitGPT's GPT in a loop of your own, trained on the 60% of bytes that gain most over a reference.

    PYTHONPATH=.venv/doors python experiments/doors/litgpt_loop.py [steps]

Only the loss differs from plain training, and the scores that it is given. To keep LitGPT's own
`pretrain` instead, see slm.integrations.litgpt. Seconds on a CPU.
"""

import sys

import stand_in
import torch
from litgpt import GPT, Config

from slm_kernels import selective_cross_entropy_from_logits

LENGTH = 64


def main(steps: int) -> None:
    torch.manual_seed(0)
    model = GPT(Config(block_size=LENGTH, padded_vocab_size=256, n_layer=2, n_head=2, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, batch in enumerate(stand_in.batches(steps, rows=8, length=LENGTH)):
        targets, reference_loss = batch["targets"], -batch["reference_logprob"]
        out = selective_cross_entropy_from_logits(
            model(batch["input_ids"]), targets, reference_loss, select_ratio=0.6
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
