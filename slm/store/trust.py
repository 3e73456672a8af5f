"""Nothing that a model's folder brings along is executed: no code of its own, no fetched kernel.

Who wants a folder's code names its file by the key `modules`, and the file registers its classes
(`AutoConfig.register`, `AutoModelForCausalLM.register`); of the folder no code is run even then.

Transformers asks on the terminal whether to run a folder's own modules, and fetches the attention
kernel that a config names, whatever implementation its caller asks for.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slm.errors import UserError
from slm.store.files import Json, read_json

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
BUILT_IN = (None, "eager", "sdpa", "flex_attention")


def check_no_code(name: str | Path) -> None:
    """Of a model or tokenizer, by folder or hub name, before transformers loads it."""
    refuse_code(f"{name}/config.json", fields_of(lambda: model_fields(name)))
    refuse_code(f"{name}/tokenizer_config.json", fields_of(lambda: tokenizer_fields(name)))


def model_fields(name: str | Path) -> Json:
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        return {}  # without an import of PyTorch for it
    from transformers import PreTrainedConfig

    config: Any = PreTrainedConfig.get_config_dict
    return config(name)[0]


def tokenizer_fields(name: str | Path) -> Json:
    if Path(name).is_dir():
        return read_json(Path(name) / "tokenizer_config.json")
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    return get_tokenizer_config(str(name))


def fields_of(read: Callable[[], Json]) -> Json:
    """Empty where there is no such file, or a damaged one: whoever loads it says so."""
    try:
        return read()
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def refuse_code(where: str, fields: Any) -> None:
    """`fields`: of a config, as its JSON says them."""
    for key, value in pairs_of(fields):
        if key == "auto_map" and not is_registered(fields):
            raise UserError(
                f"{where}: auto_map names code of its own ({value}), which is never run; take it "
                "out of a copy of the folder if transformers has a class for it, else give "
                "modules=[FILE.py], which registers its classes with AutoConfig and "
                "AutoModelForCausalLM"
            )
        if key in ATTENTION_KEYS and value not in BUILT_IN:
            raise UserError(
                f"{where}: {key} is {value!r}, for which a kernel would be fetched; take it out "
                "(model.attn_implementation says what training computes with)"
            )


def is_registered(fields: Json) -> bool:
    """The user's own code has a class for it, and transformers has none."""
    from transformers import CONFIG_MAPPING

    name = fields["model_type"] if isinstance(fields, dict) and "model_type" in fields else None
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        return False
    return not CONFIG_MAPPING[name].__module__.startswith("transformers.")


def pairs_of(fields: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, those of nested configs too."""
    left = [fields]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield from one.items()
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)
