"""A language model that is a Markov chain of bytes, so that every probability is known.

    :  ->  a  ->  b  ->  c (0.5)  ->  1 (0.9) or 2
                     ->  d (0.5)  ->  1 (0.1) or 2      and 1, 2 end it

With 1 as the answer the probability of success is 0.5, behind `c` 0.9, behind `d` 0.1.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slm.model.build import set_special_ids
from slm.model.folder import save_model
from slm.store.tokenizer import load_tokenizer

Steps = dict[str, dict[str, float]]
STEPS: Steps = {":": {"a": 1}, "a": {"b": 1}, "b": {"c": 0.5, "d": 0.5}}
STEPS |= {"c": {"1": 0.9, "2": 0.1}, "d": {"1": 0.1, "2": 0.9}, "1": {"": 1}, "2": {"": 1}}


def chain_model(following: dict[int, dict[int, float]], size: int) -> LlamaForCausalLM:
    """What it attends to adds nothing, and the head has the log-probs of what follows a token."""
    sizes: dict[str, Any] = {"hidden_size": size, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **sizes)).eval()
    logits = torch.full((size, size), -30.0)
    for token, nexts in following.items():
        for after, share in nexts.items():
            logits[after, token] = math.log(share)
    with torch.no_grad():
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size) * 1e3)
        model.lm_head.weight.copy_(logits / math.sqrt(size))
    return model


def save_chain(folder: Path, bytes_folder: str, steps: Steps = STEPS) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(bytes_folder)
    ids = {
        text: tokenizer.encode(text)[0] if text else tokenizer.eos_token_id
        for text in letters(steps)
    }
    following = {
        ids[a]: {ids[b]: share for b, share in nexts.items()} for a, nexts in steps.items()
    }
    model = chain_model(following, 258)
    set_special_ids(model, tokenizer)
    save_model(folder, model, tokenizer, "card", {})
    return tokenizer


def letters(steps: Steps) -> set[str]:
    return {text for nexts in steps.values() for text in nexts} | set(steps)


def write_problems(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return str(path)
