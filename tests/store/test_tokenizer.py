"""Tokenizers that are loaded, trained and compared."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    models,
    pre_tokenizers,
)
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from common import swap_ids
from slm.errors import UserError
from slm.store import tokenizer as tokenizer_module
from slm.store.files import read_json, write_json
from slm.store.shards import Corpus, write_manifest
from slm.store.tokenizer import (
    EOS,
    check_same_tokenizer,
    load_corpus_tokenizer,
    load_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from text_helpers import TEXTS, encode


def test_what_is_loaded_is_saved_without_truncation_and_padding(tokenizer, tmp_path):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    changed = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    changed.save_pretrained(tmp_path / "cuts")
    assert len(Tokenizer.from_file(str(tmp_path / "cuts" / "tokenizer.json")).encode("a").ids) == 9
    load_tokenizer(tmp_path / "cuts").save_pretrained(tmp_path / "saved")
    raw = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert raw.encode("one two three").ids == tokenizer.encode("one two three")


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert encode(loaded, TEXTS).tokens.tolist() == encode(tokenizer, TEXTS).tokens.tolist()


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "PreTrainedTokenizerFast"])
def test_ids_are_those_of_the_file_whatever_class_is_named(tmp_path, caplog, name):
    """As those of many models, which name GPT-2's class and cut digits in their own way."""
    trained = train_tokenizer(["it was in 2024 or 2025 that"] * 9, 270)
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    assert len(backend.encode("2024").tokens) < 4  # it has learnt numbers
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name, "eos_token": EOS})
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    loaded = load_tokenizer(tmp_path)
    assert loaded.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert ("tokenizer.json gives other ids than" in caplog.text) == (
        name != "PreTrainedTokenizerFast"
    )
    loaded.save_pretrained(tmp_path / "again")
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.tokenize("2024") == ["2", "0", "2", "4"]


def test_a_class_that_agrees_with_its_file_stays(tokenizer, tmp_path, caplog):
    tokenizer.save_pretrained(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    loaded = load_tokenizer(tmp_path)
    assert type(loaded).__name__ == "GPT2Tokenizer" and caplog.text == ""
    assert loaded.encode("a b 12") == tokenizer.encode("a b 12")


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_without_a_class_it_is_what_transformers_would_choose(tmp_path, name):
    """By a way around AutoTokenizer, which imports PyTorch."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"bos_token": "<|im_end|>"})
    tokenizer.add_tokens(["\t\t"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "folder")
    fields = read_json(tmp_path / "folder" / "tokenizer_config.json") | {"tokenizer_class": name}
    more = {"padding_side": "left", "model_max_length": 77}
    write_json(tmp_path / "folder" / "tokenizer_config.json", fields | more)
    chosen: Any = AutoTokenizer.from_pretrained(tmp_path / "folder")
    loaded = load_tokenizer(tmp_path / "folder")
    assert type(loaded) is type(chosen) and loaded.padding_side == "left"
    assert loaded.special_tokens_map == chosen.special_tokens_map
    assert loaded.backend_tokenizer.to_str() == chosen.backend_tokenizer.to_str()
    chosen.save_pretrained(tmp_path / "chosen")
    loaded.save_pretrained(tmp_path / "loaded")
    for file in (tmp_path / "chosen").iterdir():
        assert (tmp_path / "loaded" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_tokenizer_is_loaded_without_an_import_of_torch(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    code = "import sys; from slm.store.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    code += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_training_is_deterministic_and_exact():
    first, second = (train_tokenizer(TEXTS * 3, 300) for _ in range(2))
    assert tokenizer_sha256(first) == tokenizer_sha256(second)
    assert len(first) == 300
    assert max(map(len, first.get_vocab())) <= 128


def test_padding_is_masked_and_the_end_of_a_document_is_not(tokenizer):
    rows = [tokenizer.encode("ab") + [tokenizer.eos_token_id], tokenizer.encode("abcdef")]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    labels = collate([{"input_ids": row} for row in rows])["labels"].tolist()
    assert labels == [rows[0] + [-100] * (len(rows[1]) - len(rows[0])), rows[1]]
    assert encode(tokenizer, ["<|pad|>"]).tokens.tolist().count(tokenizer.pad_token_id) == 0


def test_training_refuses_impossible_sizes():
    with pytest.raises(UserError, match="vocab_size is 257, it must be at least 258: the single"):
        train_tokenizer(TEXTS, 257)
    assert len(train_tokenizer(TEXTS, 258)) == 258
    with pytest.raises(UserError, match=r"supports only \d+ token types, .* asks for 5000"):
        train_tokenizer(TEXTS, 5000)


def test_a_mistyped_path_is_not_looked_for_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in ("corpus/tokenizer", "./tokenizer", "a/b/c"):
        with pytest.raises(UserError, match=f"no tokenizer at {name}: there is no such folder"):
            load_tokenizer(name)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", None])
def test_a_folder_without_files_is_no_tokenizer(tmp_path, model_type):
    """transformers makes an empty tokenizer, or says what is missing on the lines after a colon."""
    if model_type is not None:
        write_json(tmp_path / "config.json", {"model_type": model_type})
    with pytest.raises(UserError, match="no tokenizer at ") as caught:
        load_tokenizer(tmp_path)
    said = str(caught.value)
    assert "special tokens are all that it has" in said or "serialization file" in said
    assert "\n" not in said and not said.rstrip().endswith(":")


def huge(state: dict, kind: str) -> None:
    vocab, some = state["model"]["vocab"], 1000
    if kind == "an id":
        vocab["xqz"] = 2**31 - 5
    elif kind == "entries":
        vocab |= {f"xq{i}": 7 for i in range(some)}
    else:
        state["added_tokens"] += [state["added_tokens"][0]] * some


@pytest.mark.parametrize(
    ("kind", "ids"), [("an id", "2,147,483,644"), ("entries", "1,302"), ("added", "1,302")]
)
def test_a_huge_vocabulary_is_refused_before_it_is_loaded(
    tokenizer, tmp_path, kind, ids, monkeypatch
):
    tokenizer.save_pretrained(tmp_path)
    state = read_json(tmp_path / "tokenizer.json")
    huge(state, kind)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    monkeypatch.setattr(tokenizer_module, "read_tokenizer", lambda *_: 1 / 0)
    monkeypatch.setattr(tokenizer_module, "MAX_VOCABULARY", 1000)
    with pytest.raises(UserError, match=f"the vocabulary needs {ids} ids, at most 1,000 do"):
        load_tokenizer(tmp_path)


def test_a_huge_vocabulary_of_another_format_is_refused(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(tokenizer_module, "MAX_VOCABULARY", 299)
    monkeypatch.setattr(tokenizer_module, "rows_of", lambda path: 0)
    with pytest.raises(UserError, match="the vocabulary needs 300 ids, at most 299 do"):
        load_tokenizer(tmp_path)


def test_loading_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="which is a file: a model or tokenizer is a folder"):
        load_tokenizer(tmp_path / "tokenizer.json")
    vocab = {"[UNK]": 0, "a": 1}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(tmp_path / "no_eos")


def test_swapped_ids_are_refused_whenever_the_corpus_is_opened(text_corpus):
    swap_ids(text_corpus.tokenizer_folder)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: sha256 \w+, mani"):
        Corpus.open(text_corpus.folder)


def test_an_upgrade_of_tokenizers_orphans_no_corpus(
    tmp_path, text_corpus, make_corpus, monkeypatch, caplog
):
    old = text_corpus.manifest["tokenizer_sha256"]
    spelled = tokenizer_module.tokenizer_sha256
    other = PreTrainedTokenizerFast.from_pretrained(text_corpus.tokenizer_folder)
    other.add_tokens(["another"])
    another = spelled(other)
    monkeypatch.setattr(tokenizer_module, "tokenizer_sha256", lambda t: "new " + spelled(t))
    monkeypatch.setattr("common.tokenizer_sha256", lambda t: "new " + spelled(t))
    later = make_corpus(tmp_path / "later", [np.arange(33)], 16)
    assert load_corpus_tokenizer(text_corpus).encode("a text")
    assert f"tokenizer_sha256 new {old}, manifest.json says {old}" in caplog.text
    for recorded in (old, f"new {old}"):
        check_same_tokenizer("a", recorded, "b", text_corpus)
    with pytest.raises(UserError, match=f"^a has tokenizer new {another}, b has {old} .a hash"):
        check_same_tokenizer("a", f"new {another}", "b", text_corpus)
    check_same_tokenizer("a", text_corpus, "b", later)
    check_same_tokenizer("a", later, "b", text_corpus)
    other.save_pretrained(later.tokenizer_folder)
    plan = read_json(later.folder / "plan.json") | {"tokenizer_sha256": f"new {another}"}
    write_json(later.folder / "plan.json", plan)
    write_manifest(later.folder, "tokens", 1)
    with pytest.raises(UserError, match=f"^a has tokenizer {old}, b has new {another} .a hash"):
        check_same_tokenizer("a", text_corpus, "b", Corpus.open(later.folder))
