"""A new causal LM from the fields of its Hugging Face config; overrides; what a config says."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from slm.errors import UserError, shown
from slm.store.hub import place

ROPE_FIELDS = ("rope_theta", "rope_scaling")  # accepted by every config with rotary positions
ROPE_NAMES = ("rope_parameters", "rope_scaling")
SCALED = ("llama3", "yarn", "longrope")  # by how much longer windows are than they were
COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def new_model(
    architecture: Mapping[str, Any], vocab_size: int, attn_implementation: str | None
) -> PreTrainedModel:
    """Random weights. `architecture` may set a vocab_size above the tokenizer's, for padding."""
    try:
        return AutoModelForCausalLM.from_config(
            new_config({"vocab_size": vocab_size} | dict(architecture)),
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )
    except UserError:
        raise
    except Exception as error:  # the constructors of 150 kinds raise all sorts on odd values
        how = with_attention(attn_implementation)
        raise UserError(f"model.architecture makes no causal LM{how}: {told(error)}") from None


def new_config(architecture: Mapping[str, Any]) -> PreTrainedConfig:
    """Raises UserError, and whatever the constructor of its kind raises."""
    fields = dict(architecture)
    config_class = known_config(fields.pop("model_type", None))
    check_counts(fields)
    config = config_class(**fields)
    check_fields(fields, config)
    check_heads(fields, config)
    return config


def add_row(model: PreTrainedModel, vocab_size: int) -> None:
    """So that token `vocab_size`, the first that the tokenizer has not, has an embedding: a new row
    of random numbers where the model has no spare one. The head has one more, which no target is.
    """
    embedding: Any = model.get_input_embeddings()
    if len(embedding.weight) == vocab_size:
        model.resize_token_embeddings(vocab_size + 1, mean_resizing=False)


def with_attention(name: str | None) -> str:
    return "" if name is None else f" with attn_implementation={name}"


def told(error: Exception) -> str:
    """In one line; with its kind, where the text alone may be a mere word."""
    text = " ".join(str(error).split())
    plain = isinstance(error, OSError | ValueError | ImportError | StrictDataclassError)
    return text if plain else f"{type(error).__name__}: {text}"


def known_config(model_type: str | None) -> type[PreTrainedConfig]:
    where = f"model.architecture.model_type is {model_type!r}"
    if model_type is None or model_type not in CONFIG_MAPPING:
        raise UserError(f"{where}, it must be a model type of transformers, e.g. llama")
    kind = CONFIG_MAPPING[model_type]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{where}, of which transformers has no causal LM")
    parts: Any = kind.sub_configs
    if "text_config" in parts:
        raise UserError(
            f"{where}, a model of more than text: take the model type of its text part, as "
            "gemma3_text of gemma3"
        )
    return kind


def check_counts(fields: Mapping[str, Any]) -> None:
    for name in fields.keys() & set(COUNTS):
        value = fields[name]
        if type(value) is int and value < 1:
            raise UserError(f"model.architecture.{name} is {value}, it must be at least 1")


def check_heads(fields: Mapping[str, Any], config: PreTrainedConfig) -> None:
    name = "num_key_value_heads"
    if name not in fields or not isinstance(fields[name], int):  # some have one a layer
        return
    heads = config.num_attention_heads
    if heads % fields[name]:
        raise UserError(
            f"model.architecture.{name} is {fields[name]}, it must divide num_attention_heads, "
            f"which is {heads}"
        )


def override_config(config: PreTrainedConfig, override: Mapping[str, Any]) -> None:
    """Other values for fields of a loaded model's config, in place (`model.override`).

    rope_theta and what is given as rope_parameters (or rope_scaling, its old name) go into the
    config's rope_parameters: transformers 5 reads them there alone, and takes a rope_theta beside
    them for nothing. Weights stay as they are, so fields that they have the shape of cannot change.
    """
    text = text_config(config)
    check_fields(override, text, "model.override")
    check_numbers(override, vars(text))
    before, limit = shapes(config), position_limit(config)
    fields = dict(override)
    given = [fields.pop(name) or {} for name in ROPE_NAMES if name in fields]
    rope = {key: value for part in given for key, value in part.items()}
    if "rope_theta" in fields:
        rope["rope_theta"] = fields.pop("rope_theta")
    for name, value in fields.items():
        setattr(text, name, value)
    if rope:
        check_numbers(rope, getattr(text, "rope_parameters", None) or {})
        override_rope(text, with_original(rope, limit))
    text.validate()
    for name, shape in shapes(config).items():
        if name in before and before[name] != shape:
            raise UserError(
                f"model.override={dict(override)}: {name} would be {list(shape)}, the model has "
                f"{list(before[name])}: what weights have the shape of cannot change"
            )


def check_numbers(override: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name in override.keys() & values.keys():
        new, old = override[name], values[name]
        if type(old) in (int, float) and type(new) not in (int, float, type(None)):
            raise UserError(f"model.override.{name} is {shown(new)}, a number as {old} is needed")


def shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Of a causal LM's weights; takes no memory. Of a kind that is none here, nothing is known."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = model_class._from_config(deepcopy(config))
    return {name: weight.shape for name, weight in model.named_parameters()}


def override_rope(text: PreTrainedConfig, rope: Mapping[str, Any]) -> None:
    """rope: fields of rope_parameters, or of those of a layer type where each has its own."""
    found = getattr(text, "rope_parameters", None)
    if not found:
        raise UserError(
            f"model.override has {sorted(rope)}, {type(text).__name__} has no rotary positions"
        )
    kinds = [name for name, value in found.items() if isinstance(value, Mapping)]
    if unknown := [name for name in rope if kinds and name not in kinds]:
        raise UserError(
            f"model.override has {unknown[0]}, and layers of this model have rotary positions of "
            f"their own: name whose, {{rope_parameters: {{{kinds[0]}: {{rope_theta: 1e6}}}}}} "
            f"({', '.join(kinds)})"
        )
    parts = {name: {**found[name], **value} for name, value in rope.items() if name in kinds}
    text.rope_parameters = {**found, **rope, **parts}
    text.standardize_rope_params()


def with_original(rope: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Scaled from the positions that the model had, where not said otherwise: transformers would
    take those that it is to have."""
    kind = rope["rope_type"] if "rope_type" in rope else None
    return ({"original_max_position_embeddings": limit} if kind in SCALED else {}) | dict(rope)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What the text part of a model is made of: all of it, or a config inside (Gemma 3)."""
    return config.get_text_config(decoder=True)


def position_limit(config: PreTrainedConfig) -> int | None:
    """The longest window. Models without positions have no such field, XLNet's is -1."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def positions_of(
    init_from: str | None,
    architecture: Mapping[str, Any] | None,
    override: Mapping[str, Any] | None = None,
) -> int | None:
    """`position_limit` of a model that is not built yet; None where its config is a riddle, of
    which whoever builds it says more."""
    try:
        if init_from is None:
            config = new_config(architecture or {})
        else:
            config = AutoConfig.from_pretrained(**place(init_from), trust_remote_code=False)
        if override:
            override_config(config, override)
    except Exception:  # 150 kinds of configs raise all sorts
        return None
    return position_limit(config)


def check_length(
    config: PreTrainedConfig | int | None,  # or its position_limit
    seq_len: int,
    what: str = "corpus",
    remedy: str = "`slm train` with model.override={override} (of a new model: among the fields of "
    "model.architecture) makes one that has as many",
) -> None:
    """Refuse windows that are longer than the model has positions."""
    limit = position_limit(config) if isinstance(config, PreTrainedConfig) else config
    if limit is not None and seq_len > limit:
        override = f"{{max_position_embeddings: {seq_len}}}"
        raise UserError(
            f"{what} seq_len is {seq_len}, model max_position_embeddings is {limit}: "
            + remedy.format(override=override)
        )


def check_fields(
    fields: Mapping[str, Any], config: PreTrainedConfig, where: str = "model.architecture"
) -> None:
    """A config keeps fields it does not know, and so a typing error would train another model."""
    kind = type(config)
    known = {*inspect.signature(kind).parameters, *kind.attribute_map, *ROPE_FIELDS}
    others = fields.keys() - known
    for name in others and others - fields_read(config):
        raise UserError(
            f"{where}.{name} is no field of {kind.__name__}; it has {', '.join(sorted(known))}"
        )


def fields_read(config: PreTrainedConfig) -> set[str]:
    """What the code of its model asks a config for while it builds one; takes no memory.

    Model code reads fields that no config declares: head_dim in some 60 model types.
    """
    kind, read = type(config), set()

    class Watched(kind):
        def __getattribute__(self, key: str) -> Any:
            read.add(key)
            return super().__getattribute__(key)

    config.__class__ = Watched
    try:
        with torch.device("meta"):
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
            model_class._from_config(config)
    finally:
        config.__class__ = kind
    return {name for name in read if not hasattr(kind, name)}  # of itself: methods, properties
