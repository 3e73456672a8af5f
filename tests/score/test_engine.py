"""vLLM's interface as documented, by a stand-in: what it is asked, what becomes of its answers."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model_helpers import LLAMA
from slm.errors import UserError
from slm.model.architecture import new_model
from slm.model.build import load_model
from slm.model.folder import save_model
from slm.score import engine as module
from slm.score.command import score
from slm.store.shards import References


class Engine:
    """LLM.generate of a model that transformers computes; a test may spoil its answers."""

    spoil: Any = staticmethod(lambda answer: answer)

    def __init__(self, model: str, **settings: Any):
        self.model, self.settings = load_model(model), settings
        Engine.last = self

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
        assert (params.max_tokens, params.temperature, params.prompt_logprobs) == (1, 0.0, 0)
        return [Engine.spoil(self.answer(prompt["prompt_token_ids"])) for prompt in prompts]

    def answer(self, ids: list[int]) -> SimpleNamespace:
        assert len(ids) < self.settings["max_model_len"]
        with torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for place, token in enumerate(ids[1:]):
            found = {token: logprobs[place, token].item()}
            entries.append({t: SimpleNamespace(logprob=p, rank=1) for t, p in found.items()})
        return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=entries, outputs=[])


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    torch.manual_seed(0)
    save_model(tmp_path / "model", new_model(LLAMA, 300, None), tokenizer, "card", {})
    vllm: Any = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = Engine, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0.0.stand-in")
    monkeypatch.setattr(Engine, "spoil", staticmethod(lambda answer: answer))
    return tmp_path / "model"


def test_its_scores_are_those_of_the_model(tmp_path, text_corpus, folder):
    words: dict[str, Any] = {"reference_model": folder, "device": "cpu", "batch_size": 7}
    one = References.open(score(text_corpus, tmp_path / "one", **words))
    two = References.open(score(text_corpus, tmp_path / "two", scores="vllm", **words))
    for shard in one.shards:
        found, expected = (np.array(s.column("logprobs", shard.index)[1:]) for s in (two, one))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    engine = {"name": "vllm", "version": "0.0.stand-in", "tp_size": 1}
    assert two.manifest["scoring"]["engine"] == engine
    assert two.manifest["model_sha256"] == one.manifest["model_sha256"]
    with pytest.raises(UserError, match="holds another run: scoring is"):
        score(text_corpus, tmp_path / "one", scores="vllm", **words)


def other_token(answer: Any) -> Any:
    answer.prompt_token_ids = [*answer.prompt_token_ids[:3], 7, *answer.prompt_token_ids[4:]]
    return answer


def other_entry(answer: Any) -> Any:
    answer.prompt_logprobs[2] = {299: SimpleNamespace(logprob=-1.0)}
    return answer


def above_zero(answer: Any) -> Any:
    for one in answer.prompt_logprobs[5].values():
        one.logprob = 0.5
    return answer


def short(answer: Any) -> Any:
    answer.prompt_logprobs = answer.prompt_logprobs[:-1]
    return answer


def none(answer: Any) -> Any:
    answer.prompt_logprobs = None
    return answer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_token, "vLLM, window 0, position 3: token is 7 in the answer"),
        (other_entry, 'vLLM, window 0, position 2: token is {"299": -1.0} in the answer'),
        (above_zero, "vLLM, window 0, position 5: log-prob is 0.5"),
        (short, "vLLM, window 0: prompt_logprobs has 16 entries, the window has 17 tokens"),
        (none, "vLLM, window 0 has no prompt_logprobs"),
    ],
)
def test_an_answer_about_anything_else_is_refused(
    tmp_path, text_corpus, folder, monkeypatch, spoil, message
):
    monkeypatch.setattr(Engine, "spoil", staticmethod(spoil))
    with pytest.raises(UserError, match=f"^{message}"):
        score(text_corpus, tmp_path / "out", reference_model=folder, scores="vllm")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_it_cannot_do_is_said_before_a_model_is_loaded(tmp_path, text_corpus, folder):
    words: dict[str, Any] = {"reference_model": folder, "scores": "vllm", "out": tmp_path / "out"}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"entropy": True}, "scores is 'vllm', which gives log-probs alone"),
        ({"dtype": "bf16-mixed"}, "dtype is 'bf16-mixed', with scores=vllm it is one of"),
        ({"layout": "documents"}, "scores is 'vllm', but layout=documents"),
    ]
    for more, message in refused:
        with pytest.raises(UserError, match=message):
            score(text_corpus, **words, **more)
    assert not (tmp_path / "out").exists()


def test_without_vllm_it_says_so(tmp_path, text_corpus, folder, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs vLLM, which is not installed here"):
        score(text_corpus, tmp_path / "out", reference_model=folder, scores="vllm")
