"""Small models of every kind of head, and a batch for them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slm.model.architecture import new_model
from slm.model.build import SelectiveLM
from slm.store.windows import IGNORE_INDEX, Batch

VOCAB, LENGTH = 61, 12
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA = SIZES | {"model_type": "llama", "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 8},
    "gemma2": LLAMA | {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5},
    "cohere": LLAMA | {"model_type": "cohere", "logit_scale": 0.25},
    "granite": LLAMA | {"model_type": "granite", "logits_scaling": 4.0},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 4},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": SIZES | {"model_type": "gpt_neox"},
    "phi": LLAMA | {"model_type": "phi"},  # its head has a bias
    "opt": {
        "model_type": "opt",
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "dropout": 0.0,
    },
    "mamba": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    # Divides weights in place in evaluation mode where rescale_every is above 0.
    "rwkv": {
        "model_type": "rwkv",
        "hidden_size": 16,
        "attention_hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "context_length": 32,
        "rescale_every": 0,
    },
    # Stock classes whose logits are something else: times, not over, logits_scaling; a layer more.
    "hyperclovax": LLAMA | {"model_type": "hyperclovax", "logits_scaling": 4.0},
    "modernbert": SIZES
    | {"model_type": "modernbert-decoder", "cls_token_id": 1, "sep_token_id": 1},
}
REFUSED = ("hyperclovax", "modernbert")
RECURRENT_OR_BLIND = ("opt", "mamba", "rwkv")  # they ignore position_ids where documents restart


def small_llama(vocab_size: int = 50, tie_word_embeddings: bool = False) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=tie_word_embeddings,
    )
    return AutoModelForCausalLM.from_config(config)


TRAINABLE = [name for name in ARCHITECTURES if name not in REFUSED]
APART = [name for name in TRAINABLE if name not in RECURRENT_OR_BLIND]


def make_lm(name: str, seed: int = 0, **fields: Any) -> SelectiveLM:
    """A model with weights larger than at initialisation, and no bias that is zero."""
    torch.manual_seed(seed)
    model = new_model(ARCHITECTURES[name] | fields, VOCAB, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return SelectiveLM(model).train()


def make_batch(seed: int = 0, documents: bool = False) -> Batch:
    """Two windows, one target ignored; with `documents`, new ones begin at positions 5 and 9."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (2, LENGTH + 1), generator=generator)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:].clone()}
    batch["targets"][1, 3] = IGNORE_INDEX
    if documents:
        positions = [*range(5), *range(4), *range(LENGTH - 9)]
        batch["position_ids"] = torch.tensor([positions, positions])
        batch["targets"][:, [4, 8]] = IGNORE_INDEX
    return batch
