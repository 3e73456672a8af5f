"""Folders that bring code: refused by name, and none of it runs, whatever is answered."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    dynamic_module_utils,
    modeling_utils,
)

from model_helpers import small_llama
from slm.dynamics.command import load_checkpoint
from slm.errors import UserError
from slm.evaluate.harness import check_room
from slm.model.build import load_model
from slm.model.folder import save_model
from slm.selection.registry import import_modules
from slm.store.tokenizer import load_tokenizer, tokenizer_sha256
from slm.store.trust import refuse_code

MARKED = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).touch()


class Config(LlamaConfig):
    model_type = "marked"


class Model(LlamaForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CODE = {"AutoConfig": "marked.Config", "AutoModelForCausalLM": "marked.Model"}
LOADERS = [load_model, load_tokenizer, lambda folder: check_room(str(folder), ["gsm8k_cot"], 1)]


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch) -> Path:
    """A model whose own module leaves a mark, for a user who agrees to everything."""
    save_model(tmp_path / "model", small_llama(len(tokenizer)), tokenizer, "card", {})
    (tmp_path / "model" / "marked.py").write_text(MARKED.format(mark=str(tmp_path / "mark")))
    monkeypatch.setattr("builtins.input", lambda question: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "model"


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("model_type", ["marked", "llama"])
def test_code_of_a_model_is_refused_and_does_not_run(folder, load, model_type):
    change(folder / "config.json", auto_map=CODE, model_type=model_type)
    with pytest.raises(UserError, match=r"model/config\.json: auto_map names code.*marked\.Config"):
        load(folder)
    assert not (folder.parent / "mark").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_code_of_a_tokenizer_is_refused_and_does_not_run(folder, load):
    fields = {"AutoTokenizer": [None, "marked.Tokenizer"]}
    change(folder / "tokenizer_config.json", auto_map=fields, tokenizer_class="Tokenizer")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: auto_map names code of its own"):
        load(folder)
    assert not (folder.parent / "mark").exists()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_fetches_no_kernel(folder, load, key, monkeypatch):
    fetched: list[str] = []
    monkeypatch.setattr(
        modeling_utils, "lazy_import_flash_attention", lambda name, **_: fetched.append(name)
    )
    change(folder / "config.json", **{key: "some-one/attention"})
    with pytest.raises(UserError, match=f"json: {key} is 'some-one/attention', for which a kernel"):
        load(folder)
    assert fetched == []
    change(folder / "config.json", **{key: "eager"})
    load(folder)


REGISTERED = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class Config(LlamaConfig):
    model_type = "marked"


class Model(LlamaForCausalLM):
    config_class = Config


AutoConfig.register("marked", Config)
AutoModelForCausalLM.register(Config, Model)
"""


def test_code_that_the_user_names_is_used_and_the_folders_is_not(folder, monkeypatch):
    expected = load_model(folder).state_dict()
    change(folder / "config.json", auto_map=CODE, model_type="marked", architectures=["Model"])
    (folder.parent / "registered.py").write_text(REGISTERED)
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    with pytest.raises(UserError, match=r"else give modules=\[FILE\.py\]"):
        load_model(folder)
    import_modules([str(folder.parent / "registered.py")])
    loaded = load_model(folder)
    assert type(loaded) is sys.modules.pop("registered").Model
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert check_room(str(folder), ["gsm8k_cot"], 1) is None
    assert not (folder.parent / "mark").exists()


def test_nested_configs_are_looked_into():
    refuse_code("x", {"text_config": {"attn_implementation": None}, "layers": [{"a": 1}]})
    with pytest.raises(UserError, match="x: auto_map"):
        refuse_code("x", {"layers": [{"text_config": {"auto_map": CODE}}]})


def test_a_checkpoint_that_names_code_is_refused(tmp_path, text_corpus, tokenizer, monkeypatch):
    about = {"tokenizer_sha256": tokenizer_sha256(tokenizer)}
    about["config"] = json.dumps(small_llama().config.to_dict() | {"auto_map": CODE})
    path = tmp_path / "step-1.ckpt"
    torch.save({"about": about, "state_dict": {}}, path)
    monkeypatch.setattr("slm.train.checkpoint.check_checkpoint", lambda path: None)
    with pytest.raises(UserError, match=r"step-1\.ckpt: auto_map names code of its own"):
        load_checkpoint(path, text_corpus)
