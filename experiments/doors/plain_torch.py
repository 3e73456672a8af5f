"""A loop in plain torch, two micro-batches to a step: python experiments/doors/plain_torch.py

How many tokens a micro-batch will select depends on targets and scores alone, so the denominator of
the whole step is known before its first forward pass. No logits are made.
"""

import sys

import stand_in
import torch

from slm_kernels import select_count, selective_cross_entropy

RATIO = 0.6


def main(steps: int) -> None:
    model = stand_in.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    micro_batches = stand_in.batches(2 * steps, rows=4, length=64)
    for step in range(steps):
        pair = micro_batches[2 * step : 2 * step + 2]
        scored = [(~batch["reference_logprob"].isnan()).sum() for batch in pair]
        denominator = select_count(torch.stack(scored), RATIO).sum()
        loss = loss_all = 0.0
        for batch in pair:
            out = selective_cross_entropy(
                model.model(batch["input_ids"]).last_hidden_state,
                model.lm_head.weight,
                batch["targets"],
                -batch["reference_logprob"],
                select_ratio=RATIO,
                denominator=denominator,
            )
            out.loss.backward()
            loss += out.loss.item()
            loss_all += out.token_loss.mean().item() / 2
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss:.3f}, loss_all {loss_all:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
