"""TRL's SFTTrainer with packing and LoRA: python experiments/doors/trl_sft.py

Documents are packed best-fit and kept apart; the scores stay with their tokens.
"""

import sys
import tempfile

import stand_in
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig

from slm.integrations.trl import SelectiveSFTTrainer


def tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer asks it for the padding token alone: the dataset is tokenised."""
    words = {f"<{byte}>": byte for byte in range(stand_in.VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<0>", eos_token="<0>")


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=steps,
            max_length=256,
            packing=True,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
        )
        SelectiveSFTTrainer(
            stand_in.model(),
            arguments,
            train_dataset=Dataset.from_list(stand_in.documents(400)),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            select_ratio=0.6,
        ).train()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
