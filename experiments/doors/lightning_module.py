"""A LightningModule of one's own: python experiments/doors/lightning_module.py

Beside your own module: the mixin, `selective`, and what training_step returns.
"""

import sys

import stand_in
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from slm.integrations.lightning import SelectiveMixin
from slm.integrations.loss import SelectiveLoss


class Mine(SelectiveMixin, LightningModule):
    selective = SelectiveLoss(select_ratio=0.6)

    def __init__(self):
        super().__init__()
        self.model = stand_in.model()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = self.model.model(batch["input_ids"]).last_hidden_state
        head = {"weight": self.model.lm_head.weight}
        return self.selective_loss(hidden, head, batch["targets"], batch["reference_logprob"])

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        logged = self.trainer.callback_metrics
        if batch_idx % 2:  # the second of the step's two
            print(f"loss {logged['train/loss']:.3f}, loss_all {logged['train/loss_all']:.3f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int) -> None:
    batches = stand_in.batches(2 * steps, rows=4, length=64)
    trainer = Trainer(
        accumulate_grad_batches=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Mine(), torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
