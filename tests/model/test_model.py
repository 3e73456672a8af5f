"""Folders of models and tokenizers as people have them train, or are refused in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from model_helpers import LLAMA
from slm.errors import UserError
from slm.evaluate.command import evaluated
from slm.model.build import build_lm, load_model
from slm.model.folder import model_sha256, save_model
from slm.prepare.command import prepare
from slm.score.command import load_reference
from slm.store.tokenizer import EOS, load_corpus_tokenizer, load_tokenizer

TURN = "<|im_end|>"


def build(tokenizer: PreTrainedTokenizerFast, init_from: Path | None, rows: int):
    torch.manual_seed(0)
    folder = None if init_from is None else str(init_from)
    return build_lm(tokenizer, rows, folder, LLAMA, "sdpa", False, False, 0)


def with_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, **special: str) -> Path:
    """A model's folder whose tokenizer names these special tokens and no others."""
    backend = tokenizer.backend_tokenizer
    mine = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    model = build(tokenizer, None, 302).model
    save_model(folder, model, tokenizer, "a card", {})
    (folder / "tokenizer_config.json").unlink()
    mine.save_pretrained(folder)
    return folder


@pytest.fixture
def with_turns(tokenizer, tmp_path) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(tmp_path / "with_turns")
    made = load_tokenizer(tmp_path / "with_turns")
    made.add_special_tokens({"additional_special_tokens": [TURN]})
    return made


@pytest.mark.parametrize("eos", [None, TURN])
@pytest.mark.parametrize("pad", [None, EOS])
def test_eos_of_the_corpus_ends_documents_whatever_the_models_is(with_turns, tmp_path, eos, pad):
    """None at all, a chat's; padded with the corpus's EOS."""
    special = {key: token for key, token in (("eos_token", eos), ("pad_token", pad)) if token}
    folder = with_tokenizer(with_turns, tmp_path / "model", **special)
    assert load_tokenizer(folder, needs_eos=False).eos_token == eos
    text = tmp_path / "a.txt"
    text.write_text("one line of text\n\nanother one, and the last\n" * 9)
    sources = [{"path": str(text), "document": "line"}]
    options = {"seq_len": 8, "heldout_ratio": 0}
    if eos is None:
        with pytest.raises(UserError, match="no eos_token; .*tokenizer.eos of `slm prepare`"):
            prepare(sources, tmp_path / "no", tokenizer={"path": str(folder)}, **options)
    named = {"path": str(folder), "eos": EOS}
    corpus = prepare(sources, tmp_path / "corpus", tokenizer=named, **options).train
    assert corpus is not None and corpus.manifest["eos_id"] == 0
    ours = load_corpus_tokenizer(corpus)
    ends = corpus.column("documents", 0)[1:, 0] - 1
    assert (corpus.column("tokens", 0)[ends] == 0).all()
    assert build(ours, folder, corpus.vocab_size).model.config.eos_token_id == 0
    load_reference(str(folder), corpus, "cpu", "float32")
    found = evaluated({"m": str(folder)}, {"a": corpus}, {"a": None}, 4, "float32", "cpu")
    assert list(found) == [("m", "a")]


def test_a_token_that_ends_documents_must_be_there(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = tmp_path / "a.txt"
    text.write_text("some text")
    with pytest.raises(UserError, match="has no token '</s>', which is to be its EOS"):
        named = {"path": str(tmp_path / "tokenizer"), "eos": "</s>"}
        prepare([str(text)], tmp_path / "out", tokenizer=named)
    with pytest.raises(UserError, match="tokenizer.eos='x' is a token of no tokenizer.path"):
        prepare([str(text)], tmp_path / "out", tokenizer={"vocab_size": 300, "eos": "x"})


@pytest.mark.parametrize("kind", ["sharded", "bin", "sharded bin"])
def test_weights_in_any_files_are_the_same_model(tokenizer, tmp_path, kind):
    """bfloat16 each, as most are published."""
    model = build(tokenizer, None, 300).model.bfloat16()
    expected = {name: value.float() for name, value in model.state_dict().items()}
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="20KB" if "sharded" in kind else "1GB")
    tokenizer.save_pretrained(folder)
    if "bin" in kind:
        to_pytorch(folder)
    assert len(list(folder.glob("*.bin" if "bin" in kind else "*.safetensors"))) > (kind != "bin")
    lm = build(tokenizer, folder, 300)
    found = lm.model.state_dict()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    before = model_sha256(folder)
    part = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert model_sha256(folder) != before
    part.unlink()
    with pytest.raises(UserError, match="no causal LM at|lacks|holds no"):
        load_model(folder)


def to_pytorch(folder: Path) -> None:
    """As transformers 4 saved: .bin files, and an index where there are several."""
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), folder / renamed(path.name))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        record = json.loads(index.read_text())
        record["weight_map"] = {k: renamed(v) for k, v in record["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(record))
        index.unlink()


def renamed(name: str) -> str:
    return "pytorch_" + name.replace(".safetensors", ".bin")


def test_added_tokens_beyond_the_models_rows_are_named(with_turns, tokenizer, tmp_path):
    save_model(tmp_path / "model", build(tokenizer, None, 300).model, with_turns, "a card", {})
    message = "vocab_size is 300, the tokenizer has 301 tokens: '<.im_end.>' is 300, for which"
    with pytest.raises(UserError, match=message):
        build(with_turns, tmp_path / "model", len(with_turns))
