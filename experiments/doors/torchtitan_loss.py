"""torchtitan's debug Llama with SelectiveChunkedLoss, without its Trainer, which asks for a GPU.

    PYTHONPATH=.venv/doors python experiments/doors/torchtitan_loss.py [steps]

The reference is a bigram model of the curated text in SLM_DATA (../shared/data where it exists),
the corpus general text. With torchtitan's Trainer this loop is not yours: `SelectiveTrainer.Config`
in your config registry and `reference_logprob` in your dataloader are all that changes. A minute.
"""

import os
import sys
from pathlib import Path

import torch
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, model_registry

from slm.integrations.torchtitan import SelectiveChunkedLoss

DATA = Path(os.environ.get("SLM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ROWS, LENGTH = 4, 64


def read(name: str, size: int) -> torch.Tensor:  # (size,)
    return torch.tensor(list((DATA / name).read_bytes()[:size]))


def bigram_logprob(text: torch.Tensor) -> torch.Tensor:  # (256, 256): of a byte after another
    counts = torch.ones(256, 256).index_put_((text[:-1], text[1:]), torch.ones(1), accumulate=True)
    return (counts / counts.sum(1, keepdim=True)).log()


def main(steps: int) -> None:
    torch.manual_seed(0)
    reference = bigram_logprob(read("curated/gsm8k_train.jsonl", 200_000))
    corpus = read("general/tinyshakespeare.txt", steps * ROWS * LENGTH + 1)
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
    for step in range(steps):
        bytes_read = corpus[step * ROWS * LENGTH :][: ROWS * LENGTH + 1]
        inputs, labels = bytes_read[:-1].view(ROWS, LENGTH), bytes_read[1:].view(ROWS, LENGTH)
        loss_fn.bind(reference[inputs, labels])  # you would read it from your shards
        loss, _ = loss_fn(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
