"""TRL's DPOTrainer on the tokens of a pair that matter: python experiments/doors/trl_dpo.py

A line of code goes on as it does (chosen) or as another line does (rejected). The reference's
log-probs stand beside the tokens; slm.integrations.datasets.score_pairs makes them with a model.
"""

import sys
import tempfile
from typing import Any

import stand_in
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl_sft import tokenizer

from slm.integrations.trl import SelectiveDPOTrainer

PROMPT, RESPONSE = 16, 32


def pairs() -> Dataset:
    lines = [line for line in stand_in.corpus().splitlines() if len(line) >= PROMPT + RESPONSE]
    logprob, rows = stand_in.bigram_logprob(), []
    for line, other in zip(lines, [*lines[1:], lines[0]], strict=True):
        row: dict[str, Any] = {"prompt_ids": list(line[:PROMPT])}
        for side, source in (("chosen", line), ("rejected", other)):
            ids = list(source[PROMPT : PROMPT + RESPONSE])
            row[f"{side}_ids"] = ids
            row[f"{side}_reference_logprob"] = logprob[[line[PROMPT - 1], *ids[:-1]], ids].tolist()
        rows.append(row)
    return Dataset.from_list(rows)


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"logging_steps": 1, "report_to": "none", "save_strategy": "no"}
        options |= {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "bf16": False}
        arguments = DPOConfig(folder, max_steps=steps, precompute_ref_log_probs=True, **options)
        SelectiveDPOTrainer(
            stand_in.model(),
            args=arguments,
            train_dataset=pairs(),
            processing_class=tokenizer(),
            select_ratio=0.4,
        ).train()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
