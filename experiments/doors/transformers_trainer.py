"""Hugging Face's Trainer: python experiments/doors/transformers_trainer.py

Beside your own call of Trainer: the class, select_ratio, and a column reference_logprob.
"""

import sys
import tempfile

import stand_in
from datasets import Dataset
from transformers import DataCollatorWithFlattening, TrainingArguments

from slm.integrations.transformers import SelectiveTrainer


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
        )
        SelectiveTrainer(
            stand_in.model(),
            arguments,
            data_collator=DataCollatorWithFlattening(),  # any collator
            train_dataset=Dataset.from_list(stand_in.documents(400)),
            select_ratio=0.6,
        ).train()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
