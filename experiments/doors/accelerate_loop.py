"""A loop with Accelerate: accelerate launch experiments/doors/accelerate_loop.py

Two micro-batches to a step on each process. The denominator is the number of tokens selected in all
of them on all processes; DDP averages the gradients of the processes, hence num_processes. The loss
is computed in the forward of what DDP wraps, so that its hooks see the gradients.
"""

import sys

import stand_in
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from slm_kernels import select_count, selective_cross_entropy

RATIO, ACCUMULATE = 0.6, 2


class WithLoss(nn.Module):
    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], denominator: Tensor) -> Tensor:
        hidden = self.model.model(batch["input_ids"]).last_hidden_state
        reference_loss = -batch["reference_logprob"]
        head, targets = self.model.lm_head.weight, batch["targets"]
        return selective_cross_entropy(
            hidden, head, targets, reference_loss, select_ratio=RATIO, denominator=denominator
        ).loss


def main(steps: int) -> None:
    # By default Accelerate divides by the number of micro-batches: here the denominator does it.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = WithLoss(stand_in.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = stand_in.batches(ACCUMULATE * ranks * steps, rows=4, length=64)[rank::ranks]
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(steps):
        parts = mine[ACCUMULATE * step : ACCUMULATE * (step + 1)]
        parts = [{key: v.to(accelerator.device) for key, v in part.items()} for part in parts]
        counts = torch.stack([(~part["reference_logprob"].isnan()).sum() for part in parts])
        denominator = accelerator.reduce(select_count(counts, RATIO).sum(), "sum")
        loss = torch.zeros((), device=accelerator.device)
        for part in parts:
            part_loss = model(part, denominator)
            accelerator.backward(part_loss * ranks)
            loss += part_loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {accelerator.reduce(loss, 'sum'):.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
