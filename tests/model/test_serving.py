"""Each rule that vLLM's loader sets, kept and broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from slm.model.architecture import new_model
from slm.model.build import set_special_ids
from slm.model.folder import save_model
from slm.model.serving import (
    NATIVE,
    THROUGH_TRANSFORMERS,
    VLLM_VERSION,
    broken_rules,
    notes,
    special_ids,
)
from slm.store.files import hash_file, read_json, sealed, write_json
from slm.verify import verify

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama tied": SIZES | {"tie_word_embeddings": True},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gemma2": SIZES | {"head_dim": 8},
    "gemma3_text": SIZES | {"head_dim": 8},
    "mistral": SIZES,
    "granite": SIZES,
    "phi3": SIZES,
    "olmo2": SIZES,
    "gpt_neox": {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"},
    "gpt2": GPT2,
}


@pytest.fixture(scope="session")
def make(tmp_path_factory, tokenizer) -> Callable[[str], Path]:
    """make(shape) -> folder of a model as training saves it"""

    def made(shape: str) -> Path:
        folder = tmp_path_factory.mktemp("served") / "model"
        fields = {"model_type": shape.split()[0], "pad_token_id": 0} | SHAPES[shape]
        model = new_model(fields, len(tokenizer), None)
        set_special_ids(model, tokenizer)
        save_model(folder, model, tokenizer, "card", {})
        return folder

    return made


@pytest.fixture(scope="session")
def whole(make) -> Path:
    return make("llama tied")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    """Fields of a JSON file; None removes one. slm.json is made to agree."""
    changed = {key: value for key, value in (read_json(path) | fields).items() if value != "gone"}
    path.write_text(json.dumps(changed))
    agree(path.parent)


def agree(folder: Path) -> None:
    """The hashes in slm.json are those of the files: nothing is damaged, only wrong."""
    record = read_json(folder / "slm.json")
    present = {name for name in record["sha256"] if (folder / name).exists()}
    hashes = {"sha256": {name: hash_file(folder / name) for name in present}}
    write_json(folder / "slm.json", sealed(record | hashes))
    (folder / "slm.json").chmod(0o644)


# ---- kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_what_training_saves_breaks_no_rule(make, shape):
    folder = make(shape)
    assert broken_rules(folder) == []
    (name,) = read_json(folder / "config.json")["architectures"]
    assert name in NATIVE | THROUGH_TRANSFORMERS
    assert [text.split()[-1] for text in notes(folder)] == (
        ["transformers"] if name in THROUGH_TRANSFORMERS else []
    )
    ((_, good, _),) = verify(folder)
    assert good


def test_ids_are_those_that_transformers_reads(whole, tokenizer):
    loaded: Any = AutoTokenizer.from_pretrained(whole)
    expected = {name: getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert special_ids(whole) == expected == {"bos": None, "eos": 0, "pad": 1}
    config = GenerationConfig.from_pretrained(whole)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 0, 1)


def test_ids_of_a_tokenizer_with_three_special_tokens(tmp_path, tokenizer):
    other = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>", eos_token="<|endoftext|>", pad_token="<pad>",
    )  # fmt: skip
    other.save_pretrained(tmp_path)
    expected = {name: getattr(other, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert special_ids(tmp_path) == expected and len(set(expected.values())) == 3


# ---- broken -------------------------------------------------------------------------------------


def untie(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    agree(folder)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()
    agree(folder)


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no class": (
        lambda f: change(f / "config.json", architectures="gone"),
        "{f}/config.json: architectures is None, it must name a class",
    ),
    "empty class": (
        lambda f: change(f / "config.json", architectures=[]),
        "{f}/config.json: architectures is [], it must name a class",
    ),
    "no tokenizer": (
        lambda f: remove(f, "tokenizer.json", "tokenizer_config.json"),
        "{f} has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json is in it",
    ),
    "no special tokens": (
        lambda f: remove(f, "tokenizer_config.json"),
        "{f}/tokenizer_config.json is missing: it names the special tokens",
    ),
    "no generation config": (
        lambda f: remove(f, "generation_config.json"),
        "{f}/generation_config.json is missing: an engine reads the ids to stop at from it",
    ),
    "another end": (
        lambda f: change(f / "generation_config.json", eos_token_id=2),
        "{f}/generation_config.json: eos_token_id is 2, the tokenizer's is 0",
    ),
    "no end": (
        lambda f: change(f / "config.json", eos_token_id="gone"),
        "{f}/config.json: eos_token_id is None, the tokenizer's is 0",
    ),
    "no padding": (
        lambda f: change(f / "generation_config.json", pad_token_id="gone"),
        "{f}/generation_config.json: pad_token_id is None, the tokenizer's is 1",
    ),
    "tied, with a head": (
        untie,
        "{f}/config.json: tie_word_embeddings is true, but the weights hold lm_head.weight as well",
    ),
    "untied, without a head": (
        lambda f: change(f / "config.json", tie_word_embeddings=False),
        "{f}/config.json: tie_word_embeddings is false, but the weights hold no lm_head.weight",
    ),
    "a base under one name": (
        lambda f: change(f / "config.json", rope_parameters={"rope_theta": 5e5}, rope_theta="gone"),
        "{f}/config.json: rope_theta is 500000.0 in rope_parameters, and 10000 to engines on "
        "transformers 4, which read rope_theta beside it",
    ),
    "private weights": (
        lambda f: (f / "model.safetensors").chmod(0o600),
        "{f}/model.safetensors has mode 0600, other accounts cannot read it (444)",
    ),
    "private folder": (
        lambda f: f.chmod(0o700),
        "{f} has mode 0700, other accounts cannot read it (555)",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_rule_is_one_sentence(folder, case):
    break_it, expected = BREAKS[case]
    break_it(folder)
    sentence = expected.format(f=folder)
    if case == "no special tokens":  # then the ids in the configs are nobody's
        assert sentence in broken_rules(folder)
    else:
        assert broken_rules(folder) == [sentence]
    ((_, good, text),) = verify(folder)
    assert not good and sentence in text


def test_two_broken_rules_are_both_said(folder):
    change(folder / "config.json", architectures=[])
    (folder / "config.json").chmod(0o640)
    ((_, good, text),) = verify(folder)
    assert not good and "it must name a class; " in text and "has mode 0640" in text


def test_an_unknown_class_is_a_note(folder):
    change(folder / "config.json", architectures=["MyForCausalLM"])
    ((_, good, text),) = verify(folder)
    assert good and text.endswith(
        f"note: MyForCausalLM is not among the classes known here to load in vLLM {VLLM_VERSION}"
    )


def test_a_model_of_another_origin_may_break_rules_and_is_told(folder):
    remove(folder, "generation_config.json")
    (folder / "slm.json").unlink()
    ((_, good, text),) = verify(folder)
    assert good and "generation_config.json is missing" in text


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, tokenizer):
    backend = tokenizer.backend_tokenizer
    plain = type(tokenizer)(tokenizer_object=backend, eos_token="<|endoftext|>")
    model = new_model({"model_type": "llama", "pad_token_id": 0} | SIZES, len(plain), None)
    set_special_ids(model, plain)
    save_model(tmp_path / "model", model, plain, "card", {})
    assert special_ids(tmp_path / "model") == {"bos": None, "eos": 0, "pad": None}
    assert broken_rules(tmp_path / "model") == []


def test_the_ids_of_a_base_model_break_no_rule(folder):
    change(folder / "config.json", eos_token_id=[5, 0], bos_token_id=1)
    change(folder / "generation_config.json", eos_token_id=[0, 7], pad_token_id=4)
    assert broken_rules(folder) == []
    change(folder / "generation_config.json", eos_token_id=[5, 7])
    assert broken_rules(folder) == [
        f"{folder}/generation_config.json: eos_token_id is [5, 7], the tokenizer's is 0"
    ]
