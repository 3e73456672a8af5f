"""A saved folder holds the model, describes itself, and is never half written."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from model_helpers import LLAMA, make_batch
from slm.errors import UserError
from slm.model import folder as model_folder
from slm.model.architecture import new_model
from slm.model.build import load_model
from slm.model.folder import model_sha256, save_model


def make_model(**fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return new_model(LLAMA | fields, 300, None)


@pytest.fixture
def saved(tmp_path, tokenizer) -> Path:
    save_model(tmp_path / "model", make_model(), tokenizer, "a card", {"seed": 0})
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [False, True])
def test_saved_folder_gives_the_same_logits_bit_for_bit(tmp_path, tokenizer, tied):
    model = make_model(tie_word_embeddings=tied).eval()
    save_model(tmp_path / "m", model, tokenizer, "card", {})
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = make_batch()["input_ids"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    shared = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert shared is tied
    assert tied is ("lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors"))


def test_positions_are_named_as_transformers_4_reads_them(tmp_path, tokenizer):
    """And transformers 5 finds in both what was saved."""
    ids = torch.arange(24)[None]
    for number, rope in enumerate(
        [
            {"rope_type": "default", "rope_theta": 500.0},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
        ]
    ):
        model = make_model(rope_scaling=rope).eval()
        save_model(tmp_path / str(number), model, tokenizer, "card", {})
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["rope_parameters"] == rope and config["rope_theta"] == rope["rope_theta"]
        scaling = config.pop("rope_scaling", None)
        assert scaling == ({"rope_type": "linear", "factor": 4.0} if number else None)
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert loaded.config.rope_parameters == rope
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_saved_folder_is_open_to_others_whatever_the_umask(tmp_path, tokenizer):
    before = os.umask(0o077)
    try:
        save_model(tmp_path / "m", make_model(), tokenizer, "card", {})
    finally:
        os.umask(before)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o644}


def test_saved_folder_is_readable_by_others_and_describes_itself(saved):
    for path in saved.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path.name
    record = json.loads((saved / "slm.json").read_text())
    assert record["lineage"] == {"seed": 0}
    assert record["sha256"].keys() == {p.name for p in saved.iterdir()} - {"slm.json"}
    assert (saved / "README.md").read_text() == "a card"


def test_a_failure_of_the_system_below_safetensors_is_one_sentence(saved, tokenizer):
    """Its writer is not Python's: the error has a type of its own, and names no file."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match="^/.*/model cannot be written: File too large$"):
            save_model(saved, make_model(), tokenizer, "b", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def crash(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "tokenizer", "hashes", "sync"])
def test_a_crash_while_saving_leaves_the_folder_before(saved, tokenizer, monkeypatch, where):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = make_model(rms_norm_eps=1e-5)
    target = {
        "weights": (type(other), "save_pretrained"),
        "tokenizer": (type(tokenizer), "save_pretrained"),
        "hashes": (model_folder, "hash_file"),
        "sync": (os, "fsync"),
    }[where]
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="/model cannot be written: No space left"),
    ):
        patch.setattr(*target, crash)
        save_model(saved, other, tokenizer, "b", {})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    save_model(saved, other, tokenizer, "b", {})
    assert json.loads((saved / "config.json").read_text())["rms_norm_eps"] == 1e-5
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_identity_survives_saving_again_and_tells_models_apart(saved, tmp_path, tokenizer):
    identity = model_sha256(saved)
    save_model(tmp_path / "again", load_model(saved), tokenizer, "another card", {"x": 1})
    assert model_sha256(tmp_path / "again") == identity
    model = make_model()
    save_model(tmp_path / "same", model, tokenizer, "", {})
    assert model_sha256(tmp_path / "same") == identity
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    save_model(tmp_path / "weights", model, tokenizer, "", {})
    save_model(tmp_path / "config", make_model(rms_norm_eps=1e-5), tokenizer, "", {})
    others = {model_sha256(tmp_path / "weights"), model_sha256(tmp_path / "config")}
    assert len(others | {identity}) == 3


def test_weights_of_pytorch_and_a_gguf_have_an_identity(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    found = set()
    for scale in (1, 1, 2):
        torch.save(
            {name: scale * value for name, value in state.items()}, saved / "pytorch_model.bin"
        )
        found.add(model_sha256(saved))
    assert len(found) == 2
    for text in ("a", "a", "b"):
        (tmp_path / "m.gguf").write_text(text)
        found.add(model_sha256(tmp_path / "m.gguf"))
    assert len(found) == 4


def test_large_files_are_hashed_once(saved, monkeypatch):
    read: list[str] = []
    own = model_folder.hash_file
    monkeypatch.setattr(model_folder, "hash_file", lambda path: read.append(path.name) or own(path))
    monkeypatch.setattr(model_folder, "LARGE", 1000)
    weights, record = saved / "model.safetensors", saved / ".sha256.json"
    identity = model_sha256(saved)
    assert not record.exists()  # it was written just now, and may still change within a tick
    os.utime(weights, (1_000_000_000, 1_000_000_000))
    read.clear()
    assert [model_sha256(saved) for _ in range(3)] == [identity] * 3
    assert read == ["model.safetensors"] and record.exists()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, (1_000_000_001, 1_000_000_001))
    changed = model_sha256(saved)
    assert changed != identity == model_sha256(saved).replace(changed, identity)
    record.write_text("{")
    assert model_sha256(saved) == changed


def test_identity_needs_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*.safetensors"):
        model_sha256(saved)
