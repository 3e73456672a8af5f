"""axolotl with the plugin: PYTHONPATH=.venv/doors python experiments/doors/axolotl_run.py [steps]

What `axolotl train axolotl.yaml` calls, in its order, on a CPU, but for the loader of models, which
imports bitsandbytes; a trainer that trl has no more since 1.16 is stubbed.
"""

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

CONFIG = Path(__file__).with_name("axolotl.yaml")
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"


def make_trainer(config: Path, model: Any, **fields: Any) -> Any:
    """axolotl's trainer of a YAML; `fields` in place of some of it."""
    from transformers import Trainer, TrainingArguments

    sys.modules["trl.experimental.prm"] = absent = ModuleType("trl.experimental.prm")
    vars(absent).update(PRMTrainer=Trainer, PRMConfig=TrainingArguments)
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders.tokenizer import load_tokenizer
    from axolotl.monkeypatch.data import batch_dataset_fetcher
    from axolotl.utils.data import prepare_datasets
    from axolotl.utils.trainer import setup_trainer

    cfg = load_cfg(str(config), **fields)
    batch_dataset_fetcher.apply_multipack_dataloader_patch()  # as the loader of models does
    PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    tokenizer = load_tokenizer(cfg)
    train, evaluation, steps, _ = prepare_datasets(cfg, tokenizer)
    return setup_trainer(cfg, train, evaluation, model, tokenizer, None, steps)


def main(folder: Path, steps: int) -> None:
    import stand_in
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model, letters = stand_in.model(), {f"<{byte}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.WordLevel(letters, "<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>").save_pretrained(folder)
    model.save_pretrained(folder)
    rows = [row | {"attention_mask": [1] * len(row["labels"])} for row in stand_in.documents(1500)]
    Dataset.from_list(rows).save_to_disk(folder / "scored")
    places = {"base_model": folder, "output_dir": folder / "out", "dataset_prepared_path": folder}
    fields: dict[str, Any] = {key: str(value) for key, value in places.items()}
    fields |= {"datasets": [{"path": str(folder / "scored"), "type": None}], "max_steps": steps}
    make_trainer(CONFIG, model, **fields, bf16=False, use_cpu=True, dataset_num_proc=1).train()


if __name__ == "__main__":  # axolotl's other processes read this file as well
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 20)
