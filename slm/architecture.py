"""A new causal LM from the fields of its Hugging Face config; what such a config says."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from slm.errors import UserError

ROPE_FIELDS = ("rope_theta", "rope_scaling")  # accepted by every config with rotary positions


def new_model(
    architecture: Mapping[str, Any], vocab_size: int, attn_implementation: str | None
) -> PreTrainedModel:
    """Random weights. `architecture` may set a vocab_size above the tokenizer's, for padding."""
    fields: dict[str, Any] = {"vocab_size": vocab_size} | dict(architecture)
    config_class = known_config(fields.pop("model_type", None))
    check_fields(fields, config_class)
    try:
        config = config_class(**fields)
        return AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.architecture makes no causal LM: {reason}") from None


def known_config(model_type: str | None) -> type[PreTrainedConfig]:
    if model_type is None or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model.architecture.model_type is {model_type!r}, it must be a model type of "
            "transformers, e.g. llama"
        )
    return CONFIG_MAPPING[model_type]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What the text part of a model is made of: all of it, or a config inside (Gemma 3)."""
    return config.get_text_config(decoder=True)


def position_limit(config: PreTrainedConfig) -> int | None:
    """The longest window. Models without positions have no such field, XLNet's is -1."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def check_fields(fields: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> None:
    """A config keeps fields it does not know, and so a typing error would train another model."""
    known = {*inspect.signature(config_class).parameters, *config_class.attribute_map, *ROPE_FIELDS}
    for name in fields.keys() - known:
        raise UserError(
            f"model.architecture.{name} is no field of {config_class.__name__}; "
            f"it has {', '.join(sorted(known))}"
        )
