"""torchtitan's debug Llama with SelectiveChunkedLoss, without its Trainer, which asks for a GPU.

    PYTHONPATH=.venv/doors python experiments/doors/torchtitan_loss.py [steps]

With torchtitan's Trainer this loop is not yours: `SelectiveTrainer.Config` in your config registry
and `reference_logprob` in your dataloader are all that changes. A minute.
"""

import sys

import stand_in
import torch
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, model_registry

from slm.integrations.torchtitan import SelectiveChunkedLoss


def main(steps: int) -> None:
    torch.manual_seed(0)
    config = model_registry("debugmodel").model
    assert isinstance(config, Llama3Model.Config)
    for layer in config.layers:  # FlexAttention has no backward pass on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_weights(buffer_device=None)
    model._skip_lm_head = True  # this line and the next two are the Trainer's
    loss_fn = SelectiveChunkedLoss.Config(select_ratio=0.6).build(compile_config=None)
    loss_fn.set_lm_head(model.lm_head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in enumerate(stand_in.batches(steps, rows=4, length=64)):
        loss_fn.bind(batch["reference_logprob"])  # the Trainer's too
        loss, _ = loss_fn(model(batch["input_ids"]), batch["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
