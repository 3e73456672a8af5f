"""How a model goes on with prompts: several at once, several ways with each.

The keys and values of a prompt are computed once for all that follow it, where the model's cache
allows that. Letters: B prompts, T tokens of the longest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from slm.errors import UserError
from slm.model.architecture import position_limit
from slm.model.build import ids_of
from slm.model.device import computing


class Sampling(NamedTuple):
    """How tokens are drawn, and how many at most; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float


def first_ids(folder: str, tokenizer: Any) -> list[int]:
    """What stands before a text."""
    if (Path(folder) / "slm.json").exists():
        return [tokenizer.eos_token_id]
    bare = tokenizer.encode("a", add_special_tokens=False)
    found = tokenizer.encode("a")
    return found[: -len(bare)] if found[-len(bare) :] == bare else []


def check_room(
    folder: str,
    longest: int,
    config: Any,
    max_new_tokens: int,
    advice: str = "lower max_new_tokens",
) -> None:
    """longest: tokens of a prompt"""
    limit = position_limit(config)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, "
            f"together more than the {limit} positions of {folder}: {advice}"
        )


def generation_config(model: Any, eos_id: int, how: Sampling) -> GenerationConfig:
    stops = list(dict.fromkeys([eos_id, *ids_of(model.generation_config.eos_token_id or [])]))
    is_sampled = how.temperature > 0
    nucleus = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=is_sampled,
        eos_token_id=stops,
        pad_token_id=eos_id,
        **(nucleus if is_sampled else {}),
    )


def padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask (B, T), with the prompts at the right."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def continued(
    model: Any, prompts: Sequence[list[int]], config: Any, dtype: str, copies: int = 1
) -> list[list[int]]:
    """New ids, with the EOS that ends them where one does: `copies` of each prompt in turn."""
    device = model.device
    batch = padded(prompts, config.pad_token_id, device)
    width = batch["input_ids"].shape[1]
    with computing(device, dtype):
        cache = prefilled(model, batch, config, copies) if copies > 1 and width > 1 else {}
        rows = {name: tensor.repeat_interleave(copies, 0) for name, tensor in batch.items()}
        output = model.generate(**rows, **cache, generation_config=config)
    return [ended(row, config.eos_token_id) for row in output[:, width:].tolist()]


def ended(row: list[int], stops: list[int]) -> list[int]:
    """Without what pads it behind its EOS."""
    return row[: next((i + 1 for i, one in enumerate(row) if one in stops), len(row))]


def prefilled(
    model: Any, batch: dict[str, torch.Tensor], config: Any, copies: int
) -> dict[str, Any]:
    """Keys and values of all but the last token of each prompt, repeated: generate goes on there.

    Nothing where the model has states of another kind, which padding before a prompt would change.
    """
    but_last = {name: tensor[:, :-1] for name, tensor in batch.items()}
    how: dict[str, Any] = {"max_new_tokens": 1, "pad_token_id": config.pad_token_id}
    once = GenerationConfig(**how, do_sample=False, return_dict_in_generate=True)
    found = model.generate(**but_last, generation_config=once)
    cache = found.past_key_values
    if not (
        isinstance(cache, DynamicCache)
        and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    ):
        return {}
    cache.batch_repeat_interleave(copies)
    return {"past_key_values": cache}
