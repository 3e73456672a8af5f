"""What a text names, a folder here or a model on the hub; folders that hold no model."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from slm.errors import UserError
from slm.store.hub import (
    FOLDER,
    ask_hub,
    check_model_folder,
    gguf_file,
    is_folder,
    no_model,
    place,
)
from slm.store.tokenizer import load_tokenizer


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, float]]:
    """A hub that has no model; what it was asked."""
    urls: list[tuple[str, float]] = []

    def refuse(url: str, *, timeout: float) -> None:
        urls.append((url, timeout))
        raise answer(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ask_hub.cache_clear()
    return urls


def answer(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("no", response=response)  # type: ignore[call-arg]


def test_a_name_that_nobody_has_is_asked_once_and_without_retries(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        is_folder("model", "nobody/nothing")
    assert str(refused.value) == (
        f"model nobody/nothing: there is no such folder, and no model of that name at "
        f"{constants.ENDPOINT}"
    )
    (question,) = asked
    assert question[0].startswith(f"{constants.ENDPOINT}/nobody/nothing/")
    assert question[1] == constants.HF_HUB_ETAG_TIMEOUT
    with pytest.raises(UserError, match="^no tokenizer at tokeniser: there is no such folder, and"):
        load_tokenizer("tokeniser")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answer(GatedRepoError), "wants a login that may read it"),
        (OSError("Name or service not known\nmore"), r"be asked .Name or service not known.$"),
        (EntryNotFoundError("no"), None),  # there, and of a tokenizer alone
    ],
)
def test_what_the_hub_answers_is_one_sentence(asked, monkeypatch, error, said):
    def answering(url: str, *, timeout: float) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answering)
    if said is None:
        assert not is_folder("model", "some/tokenizer")
        return
    with pytest.raises(UserError, match=said) as refused:
        is_folder("model", "nobody/nothing")
    assert "\n" not in str(refused.value)


def test_offline_nobody_is_asked_and_the_cache_counts(asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is not asked: HF_HUB_OFFLINE is set"):
        is_folder("model", "nobody/nothing")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "a/file")
    assert not is_folder("model", "nobody/nothing") and asked == []


def test_a_path_is_not_asked_for(asked, tmp_path):
    for name in (f"{tmp_path}/no", "./no", "a/b/c"):
        with pytest.raises(UserError, match=f"model {name}: there is no such folder$"):
            is_folder("model", name)
    assert is_folder("model", str(tmp_path)) and asked == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "config.json is missing"),
        ({"tokenizer.json": "{}"}, "config.json is missing: it holds a tokenizer and no model"),
        ({"config.json": "{}"}, "it has no weights (*.safetensors)"),
        ({"adapter_config.json": "?"}, "it is a PEFT adapter: merge it into its model (merge_and_"),
        (
            {"adapter_config.json": json.dumps({"base_model_name_or_path": "big/one"})},
            "it is a PEFT adapter of big/one: merge it",
        ),
        ({"m.Q4_1.gguf": ""}, None),
        ({"config.json": "{}", "m.gguf": ""}, None),
        ({"a.gguf": "", "b.gguf": ""}, "it holds 2 GGUF files: name one of them, as in "),
        ({"model/config.json": "{}"}, "config.json is missing, did you mean "),
        ({"config.json": "{}", "model.safetensors": ""}, None),
    ],
)
def test_what_a_folder_holds_that_is_no_model(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    reason = no_model(tmp_path)
    assert reason == said if said is None else str(reason).startswith(said)


def test_a_gguf_is_meant_by_its_name_and_where_a_folder_has_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    assert gguf_file(file) is None and gguf_file(tmp_path) is None
    file.touch()
    assert gguf_file(file) == gguf_file(tmp_path) == file
    assert is_folder("model", str(file)) and no_model(file) is None
    assert place(tmp_path) == {FOLDER: tmp_path, "gguf_file": "m.gguf"}
    monkeypatch.setattr("slm.store.hub.find_spec", lambda name: None)
    assert no_model(file) == "it is m.gguf, which pip install gguf can read"
    (tmp_path / "model.safetensors").touch()
    assert gguf_file(tmp_path) is None and place(tmp_path) == {FOLDER: tmp_path}
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        UserError, match="notes.txt, which is a file: a model or tokenizer is a folder"
    ):
        is_folder("model", str(tmp_path / "notes.txt"))
    assert no_model(Path(tmp_path / "nowhere")) == "there is no such folder"


def test_a_run_given_for_its_model_is_told_where_the_model_is(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json is missing, did you mean .*run/model\?$"):
        check_model_folder("models", str(tmp_path / "run"))
    with pytest.raises(UserError, match="config.json is missing$"):
        check_model_folder("models", str(tmp_path))
