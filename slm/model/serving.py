"""Can an inference engine load this model folder? The rules that vLLM's loader sets, checked.

    slm verify runs/slm/model          # names every broken rule of a model of ours
    vllm serve runs/slm/model

The rules were read in the source of vLLM 0.33.0 (its wheel); vLLM itself was not run here:

    config.json names a class          models/registry.py: a class that is in no table, and that
                                       transformers does not have either, is refused
    a tokenizer lies in the folder     tokenizers/registry.py: AutoTokenizer on the model's folder
    special ids in both configs        SamplingParams stops at the tokenizer's EOS and at each EOS
                                       of generation_config.json; without that file, transformers
                                       makes one of config.json. Other engines know that file's ids
                                       alone, so the tokenizer's EOS is among them. Beginning and
                                       padding ids are not vLLM's concern, but that of `generate`
    tied weights are kept tied         model_loader/weight_tying.py: with tie_word_embeddings and
                                       an lm_head.weight in the files, the two are loaded and
                                       compared, and the file's head wins; older versions drop it
    the base of positions twice        transformers_utils/config.py: with transformers 5 that of
                                       rope_parameters, with 4 rope_theta, else 10,000
    weights are *.safetensors          model_loader/default_loader.py: the format it takes first
    every account can read the files   a service seldom runs as the account that trained
"""

import json
import stat
from pathlib import Path
from typing import Any

from slm.store.files import Json

VLLM_VERSION = "0.33.0"  # what the two lists were read from
# Common classes that vLLM implements itself, and those that it runs through transformers.
NATIVE = {
    "CohereForCausalLM", "Cohere2ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel",
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM",
    "GraniteForCausalLM", "LlamaForCausalLM", "MambaForCausalLM", "MistralForCausalLM",
    "MixtralForCausalLM", "NemotronForCausalLM", "OPTForCausalLM", "OlmoeForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM", "StableLmForCausalLM",
}  # fmt: skip
THROUGH_TRANSFORMERS = {
    "GPTNeoXForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
    "PhiForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
}  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one of them makes one
IDS = ("bos", "eos", "pad")
OLD_BASE = 10_000  # where a config of transformers 4 names none
HEADS = ("lm_head.weight", "embed_out.weight")


def broken_rules(folder: Path) -> list[str]:
    """A sentence for each rule that the folder breaks, with its file and both values."""
    config = read_object(folder / "config.json")
    return [
        *broken_class(folder, config),
        *broken_tokenizer(folder),
        *broken_ids(folder, config),
        *broken_ties(folder, config),
        *broken_base(folder, config),
        *broken_modes(folder),
    ]


def notes(folder: Path) -> list[str]:
    """What is no fault: a class that was not looked up, or one that vLLM runs less fast."""
    names = read_object(folder / "config.json").get("architectures") or []
    found = []
    for name in names:
        if name in THROUGH_TRANSFORMERS:
            found.append(f"note: vLLM {VLLM_VERSION} runs {name} through transformers")
        elif name not in NATIVE:
            found.append(
                f"note: {name} is not among the classes known here to load in vLLM {VLLM_VERSION}"
            )
    return found


def read_object(path: Path) -> Json:
    """The object in a JSON file; empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# ---- one rule at a time -------------------------------------------------------------------------


def broken_class(folder: Path, config: Json) -> list[str]:
    path = folder / "config.json"
    if not path.exists():
        return [f"{path} is missing: no engine knows what the weights are"]
    if not config.get("architectures"):
        return [f"{path}: architectures is {config.get('architectures')}, it must name a class"]
    return []


def broken_tokenizer(folder: Path) -> list[str]:
    if not any((folder / name).exists() for name in TOKENIZERS):
        return [f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)} is in it"]
    if not (folder / "tokenizer_config.json").exists():
        return [f"{folder / 'tokenizer_config.json'} is missing: it names the special tokens"]
    return []


def broken_ids(folder: Path, config: Json) -> list[str]:
    """Both configs stop at the tokenizer's EOS and name what begins and pads, where it has that.

    More ids to stop at, and another beginning or padding, come with a base model and are right.
    """
    if not (folder / "tokenizer.json").exists():
        return []  # `broken_tokenizer` says so, or the ids take another library to find
    path = folder / "generation_config.json"
    if not path.exists():
        return [f"{path} is missing: an engine reads the ids to stop at from it"]
    expected = special_ids(folder)
    expected["pad"] = expected["eos"] if expected["pad"] is None else expected["pad"]
    broken = []
    for file, found in ((folder / "config.json", config), (path, read_object(path))):
        values = {name: found.get(f"{name}_token_id") for name in IDS}
        stops = values["eos"] if isinstance(values["eos"], list) else [values["eos"]]
        wrong = [name for name in IDS if values[name] is None and expected[name] is not None]
        if expected["eos"] not in stops and "eos" not in wrong:
            wrong.append("eos")
        broken += [
            f"{file}: {name}_token_id is {values[name]}, the tokenizer's is {expected[name]}"
            for name in wrong
        ]
    return broken


def special_ids(folder: Path) -> dict[str, int | None]:
    """{"bos": id, "eos": id, "pad": id} as the tokenizer's files say; None where it has none."""
    named, state = (
        read_object(folder / f"{name}.json") for name in ("tokenizer_config", "tokenizer")
    )
    ids = {token["content"]: token["id"] for token in state["added_tokens"]}
    tokens: dict[str, Any] = {name: named.get(f"{name}_token") for name in IDS}
    texts = {name: one["content"] if isinstance(one, dict) else one for name, one in tokens.items()}
    return {name: ids.get(text) for name, text in texts.items()}


def broken_ties(folder: Path, config: Json) -> list[str]:
    """tie_word_embeddings says whether the weights hold a head."""
    tied, names = config.get("tie_word_embeddings"), weight_names(folder)
    heads = [name for name in names if name in HEADS]
    path = folder / "config.json"
    if tied is True and heads:
        return [f"{path}: tie_word_embeddings is true, but the weights hold {heads[0]} as well"]
    if tied is False and names and not heads:
        return [f"{path}: tie_word_embeddings is false, but the weights hold no {HEADS[0]}"]
    return []


def broken_base(folder: Path, config: Json) -> list[str]:
    """Where layers have positions of their own, their old names are the model's own too."""
    text = config["text_config"] if "text_config" in config else config
    rope = text["rope_parameters"] if "rope_parameters" in text else None
    if not rope or "rope_theta" not in rope:
        return []
    old = text["rope_theta"] if "rope_theta" in text else OLD_BASE
    if old == rope["rope_theta"]:
        return []
    return [
        f"{folder / 'config.json'}: rope_theta is {rope['rope_theta']} in rope_parameters, and "
        f"{old} to engines on transformers 4, which read rope_theta beside it"
    ]


def weight_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as weights:
            names += weights.keys()
    return names


def broken_modes(folder: Path) -> list[str]:
    """The folder and its files are open to every account; save_pretrained alone writes 0600."""
    broken = []
    for path, needed in [(folder, 0o555), *((item, 0o444) for item in sorted(folder.iterdir()))]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & needed != needed and not path.name.startswith("."):
            broken.append(f"{path} has mode {mode:04o}, other accounts cannot read it ({needed:o})")
    return broken
