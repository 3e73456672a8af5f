"""Your own tokenized dataset gets a column of reference scores, and keeps it through TRL's packing.

    python experiments/doors/score_own_dataset.py [--tokenizer folder] [--model folder] [--rows 50]

Python's language reference is tokenized, scored by a reference model and packed; some tokens are
printed beside their log-probs. Without folders the tokenizer is trained here and the model has
random weights. To train on the result, give it to the TRL adapter.
"""

import argparse

import stand_in
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from trl.data_utils import pack_dataset

from slm.integrations.datasets import score_dataset
from slm.store.tokenizer import load_tokenizer, train_tokenizer


def small_model(vocab_size: int):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=4))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", help="a folder or a name on the hub")
    parser.add_argument("--model", help="the same, of a causal LM with this tokenizer")
    parser.add_argument("--rows", type=int, default=50)
    given = parser.parse_args()
    texts = [text[:400] for text in stand_in.curated()[: given.rows]]
    tokenizer = load_tokenizer(given.tokenizer) if given.tokenizer else train_tokenizer(texts, 1024)
    model = given.model or small_model(len(tokenizer))

    rows = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    scored = score_dataset(Dataset.from_dict({"input_ids": rows, "labels": rows}), model)
    packed = pack_dataset(scored, 512, "bfd")  # now train: SFTTrainer's packing, done beforehand

    print(f"{len(scored)} rows -> {len(packed)} packed rows: {', '.join(packed.column_names)}")
    ids, logprobs = packed[0]["input_ids"], packed[0]["reference_logprob"]
    for token, logprob in list(zip(ids, logprobs, strict=True))[:12]:
        print(f"{tokenizer.decode([token])!r:>16} {logprob:8.3f}")


if __name__ == "__main__":
    main()
