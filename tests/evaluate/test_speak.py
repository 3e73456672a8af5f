"""Models that go on with prompts as is known beforehand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slm.errors import UserError
from slm.evaluate.generation import first_ids
from slm.evaluate.speak import encode, read_prompts, speak
from slm.model.build import set_special_ids
from slm.model.folder import save_model
from slm.store.tokenizer import train_tokenizer
from text_helpers import write_records

CHAIN = "the cat sat on the"


def successor_model(successors: dict[int, int], vocab_size: int) -> LlamaForCausalLM:
    """After token a it says successors[a], nearly surely; what it attends to adds nothing."""
    sizes: dict[str, Any] = {"hidden_size": vocab_size, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).eval()
    head = torch.zeros(vocab_size, vocab_size)
    for before, after in successors.items():
        head[after, before] = 30 / math.sqrt(vocab_size)
    with torch.no_grad():
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size) * 1e3)
        model.lm_head.weight.copy_(head)
    return model


@pytest.fixture
def model(tmp_path, tokenizer) -> str:
    """It counts token ids up from 10 to 29 and ends; each text begins at 10, after an EOS."""
    eos = tokenizer.eos_token_id
    one = successor_model({eos: 10, **{i: i + 1 for i in range(10, 29)}, 29: eos}, 300)
    set_special_ids(one, tokenizer)
    save_model(tmp_path / "model", one, tokenizer, "card", {})
    return str(tmp_path / "model")


def prompts_of(tmp_path: Path, *texts: str) -> str:
    return str(write_records(tmp_path / "p.jsonl", *[{"text": text} for text in texts]))


def test_greedy_texts_end_where_the_model_ends_them(tmp_path, model, tokenizer):
    starts = [tokenizer.decode(ids) for ids in ([20], [25, 26], [10])]
    assert [tokenizer.encode(text) for text in starts] == [[20], [25, 26], [10]]
    prompts = prompts_of(tmp_path, *starts)
    found = speak({"m": model}, prompts, temperature=0, max_new_tokens=12, out=tmp_path / "s.jsonl")
    assert [row["prompt"] for row in found.rows] == starts
    texts = [list(range(21, 30)), list(range(27, 30)), list(range(11, 23))]  # padded beside others
    assert [row["text"] for row in found.rows] == [tokenizer.decode(ids) for ids in texts]
    assert [row["num_tokens"] for row in found.rows] == [9, 3, 12]
    assert [row["ended"] for row in found.rows] == [True, True, False]
    lines = (tmp_path / "s.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == found.rows
    (one,) = found.summaries
    assert (one["model"], one["texts"], one["mean_tokens"], one["copied"]) == ("m", 3, 8.0, None)


def test_what_is_copied_from_a_corpus_is_found(tmp_path, model, tokenizer, make_corpus):
    corpora = [
        make_corpus(tmp_path / "a", [np.r_[12:22, 100:107]], 16),
        make_corpus(tmp_path / "b", [np.r_[200:207, 24:29, 120:125]], 16),
    ]
    folders = [str(corpus.folder) for corpus in corpora]
    config: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
    prompts = prompts_of(tmp_path, tokenizer.decode([10]), tokenizer.decode([20]))
    rows = speak({"m": model, "n": model}, prompts, corpus=folders, **config).rows
    assert [row["copied_tokens"] for row in rows] == [10, 0] * 2  # 12 to 21; 24 to 28 are but 5
    assert [row["longest_copied_tokens"] for row in rows] == [10, 0] * 2
    assert [row["longest_copied"] for row in rows[:2]] == [
        tokenizer.decode(list(range(12, 22))),
        "",
    ]
    assert [row["model"] for row in rows] == ["m", "m", "n", "n"]
    alone = speak({"m": model}, prompts, corpus=folders[1], **config)
    assert alone.summaries[0]["copied"] == 0


def test_samples_are_drawn_with_the_seed_and_leave_other_draws_alone(tmp_path, tokenizer):
    flat = successor_model({}, 300)  # every token is as likely
    set_special_ids(flat, tokenizer)
    save_model(tmp_path / "flat", flat, tokenizer, "card", {})
    prompts = prompts_of(tmp_path, "a", "b c")
    config: dict[str, Any] = {"max_new_tokens": 6, "num_samples": 3}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = speak({"m": str(tmp_path / "flat")}, prompts, **config).rows
    assert torch.rand(1) == expected
    assert [row["prompt"] for row in first] == ["a"] * 3 + ["b c"] * 3
    assert len({row["text"] for row in first}) == 6
    assert speak({"m": str(tmp_path / "flat")}, prompts, **config).rows == first
    other = speak({"m": str(tmp_path / "flat")}, prompts, seed=1, **config).rows
    assert [row["text"] for row in other] != [row["text"] for row in first]


def test_prompts_are_lines_records_or_sources_and_may_be_cut(tmp_path, tokenizer):
    (tmp_path / "p.txt").write_text("one\ntwo words\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two words"]
    path = str(write_records(tmp_path / "q.jsonl", {"story": "x", "n": "1"}))
    assert read_prompts([{"path": path, "text": "{n}: {story}"}]) == ["1: x"]
    with pytest.raises(UserError, match="q.jsonl, line 1: field 'text' is missing"):
        read_prompts(path)
    with pytest.raises(UserError, match="prompts: there is none"):
        read_prompts([])
    ids = tokenizer.encode(CHAIN)
    eos = tokenizer.eos_token_id
    assert encode([CHAIN], [], tokenizer, 3) == [ids[:3]]
    assert encode([CHAIN], [eos], tokenizer, None) == [[eos, *ids]]


def test_a_text_begins_as_its_model_knows_it(tmp_path, model, tokenizer):
    assert first_ids(model, tokenizer) == [tokenizer.eos_token_id]
    (Path(model) / "slm.json").unlink()  # as from elsewhere, with a tokenizer that adds nothing
    assert first_ids(model, tokenizer) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_new_tokens": 60},
            "longest prompt has 7 tokens and max_new_tokens is 60, .* the 64 p",
        ),
        ({"temperature": -1}, "temperature is -1, it must be a number of at least 0"),
        ({"top_p": 0}, r"top_p is 0, it must be a number in \(0, 1\]"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"prompts": 3}, "prompts is 3, it must be a text that is not empty, or a list of sources"),
        ({"models": {"m": "no/such"}}, "model no/such: there is no such folder"),
        ({"corpus": "no"}, "no is not a finished corpus"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, model, changes, message):
    prompts = prompts_of(tmp_path, "abcdefgh"[:7])
    with pytest.raises(UserError, match=message):
        speak(**{"models": {"m": model}, "prompts": prompts, "out": tmp_path / "o.jsonl"} | changes)
    assert not (tmp_path / "o.jsonl").exists()


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path, model, make_corpus):
    other = train_tokenizer(["quite another text, with other merges " * 20], 280)
    save_model(tmp_path / "c", successor_model({}, 300), other, "card", {})
    folder = str(make_corpus(tmp_path / "k", [np.arange(10, 43)], 16).folder)
    with pytest.raises(UserError, match=rf"model .*c has tokenizer \w+, {folder} has \w+"):
        speak({"c": str(tmp_path / "c")}, prompts_of(tmp_path, "a"), corpus=folder)
