"""A fake server answers the requests from a local model; what it says wrongly is refused."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from slm.errors import UserError
from slm.model.build import load_model
from slm.model.folder import save_model
from slm.score import command as score
from slm.score.cost import references_cost
from slm.score.served import is_logprob
from slm.store.shards import References
from slm.train.settings import warn_of_other_precision
from slm.verify import verify

Lines = list[dict[str, Any]]


def made(config: Any) -> Path:
    return Path(score.score(**config))


@pytest.fixture
def config(tmp_path, text_corpus, tokenizer) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_attention_heads=2, **sizes))
    save_model(tmp_path / "model", llama, tokenizer, "card", {})
    return OmegaConf.create(
        {
            "corpus": str(text_corpus.folder),
            "reference_model": None,
            "requests": None,
            "responses": None,
            "served_model": None,
            "out": None,
            "entropy": False,
            "columns": [],
            "batch_size": 3,
            "dtype": "float32",
            "store_dtype": "float32",
            "device": "cpu",
            "modules": [],
            "check": "size",
        }
    )


@pytest.fixture
def asked(tmp_path, config) -> Lines:
    """What the command wants to be asked."""
    change = {"requests": str(tmp_path / "new" / "requests.jsonl"), "served_model": "big"}
    path = made(OmegaConf.merge(config, change))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def own(tmp_path, config) -> References:
    """The store that the same model makes here."""
    change = {"reference_model": str(tmp_path / "model"), "out": str(tmp_path / "own")}
    return References.open(made(OmegaConf.merge(config, change)))


@pytest.fixture
def answer(tmp_path, tokenizer) -> Callable[..., dict[str, Any]]:
    """answer(request, shape) -> a line as a server with the local model would write it."""
    model = load_model(tmp_path / "model")

    def make(request: dict[str, Any], shape: str) -> dict[str, Any]:
        ids = request["body"]["prompt"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [None, *logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]
        body = SHAPES[shape](ids, own, logprobs, tokenizer) | {"model": "big"}
        if shape == "bare":
            return {"custom_id": request["custom_id"]} | body
        response = {"status_code": 200, "request_id": "x", "body": body}
        return {"custom_id": request["custom_id"], "response": response, "error": None}

    return make


def echo(ids: list[int], own: list[Any], logprobs: Any, tokenizer: Any) -> dict[str, Any]:
    """OpenAI: parts of characters as bytes, one generated token at the end."""
    names = [openai_text(token, tokenizer) for token in [*ids, 5]]
    offsets = [sum(map(len, names[:n])) for n in range(len(names))]
    fields = {"tokens": names, "token_logprobs": [*own, -0.5], "text_offset": offsets}
    choice = {"index": 0, "text": "...", "logprobs": fields | {"top_logprobs": None}}
    return {"object": "text_completion", "choices": [choice]}


def openai_text(token: int, tokenizer: Any) -> str:
    # An independent definition: the decoder of the tokenizer shows parts as U+FFFD.
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text
    piece = tokenizer.convert_ids_to_tokens(token)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {character: byte for byte, character in bytes_to_unicode().items()}
    return "bytes:" + "".join(f"\\x{back[character]:02x}" for character in piece)


def lossy(ids: list[int], own: list[Any], logprobs: Any, tokenizer: Any) -> dict[str, Any]:
    """A server that writes U+FFFD for parts of characters, and generates nothing."""
    names = [tokenizer.decode([token]) for token in ids]
    return {"choices": [{"logprobs": {"tokens": names, "token_logprobs": own}}]}


def vllm(ids: list[int], own: list[Any], logprobs: Any, tokenizer: Any) -> dict[str, Any]:
    """vLLM's answer to the request as it is: one alternative, and the echo beside it."""
    entries = [None, *({str(i): shown(x)} for i, x in zip(ids[1:], own[1:], strict=True))]
    choice = echo(ids, own, logprobs, tokenizer)["choices"][0]
    return {"choices": [choice | {"prompt_logprobs": entries}]}


def bare(ids: list[int], own: list[Any], logprobs: Any, tokenizer: Any) -> dict[str, Any]:
    """vLLM offline with prompt_logprobs=3: alternatives first, and the prompt's ids."""
    entries: list[Any] = [None]
    for token, value, row in zip(ids[1:], own[1:], logprobs, strict=False):
        best = row.topk(3)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        entries.append({str(i): shown(x) for i, x in pairs} | {str(token): shown(value)})
    return {"prompt_token_ids": ids, "prompt_logprobs": entries}


def shown(value: float) -> dict[str, Any]:
    return {"logprob": value, "rank": 1, "decoded_token": "?"}


SHAPES = {"echo": echo, "lossy": lossy, "vllm": vllm, "bare": bare}


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def load(tmp_path, config) -> Callable[..., Path]:
    """load(lines) -> the store that `slm score` makes of them"""

    def make(*files: Lines, **change: Any) -> Path:
        paths = [str(write(tmp_path / f"{n}.jsonl", lines)) for n, lines in enumerate(files)]
        settings = {"responses": paths, "served_model": "big", "out": str(tmp_path / "imported")}
        return made(OmegaConf.merge(config, settings | change))

    return make


# ---- the round trip -----------------------------------------------------------------------------


def test_requests_name_every_window_and_hold_its_tokens(asked, text_corpus):
    assert len(asked) == 40 and len({line["custom_id"] for line in asked}) == 40
    tokens = [text_corpus.column("tokens", index) for index in range(2)]
    for window, line in enumerate(asked):
        start = window % 20 * 16
        expected = tokens[window // 20][start : start + 17].tolist()
        assert line["body"]["prompt"] == expected
        assert line["custom_id"] == f"{text_corpus.fingerprint[:12]}-{window}"
        assert (line["method"], line["url"]) == ("POST", "/v1/completions")
        rest = {key: value for key, value in line["body"].items() if key != "prompt"}
        asks = {"model": "big", "max_tokens": 1, "temperature": 1, "echo": True, "logprobs": 0}
        assert rest == asks


@pytest.mark.parametrize("shape", SHAPES)
def test_a_store_of_answers_is_the_one_that_is_scored_here(asked, answer, load, own, shape):
    lines = [answer(request, shape) for request in asked]
    np.random.default_rng(0).shuffle(lines)  # type: ignore[arg-type]
    out = load(lines[:13], lines[13:])
    found = References.open(out, "full")
    for index in range(2):
        expected, values = own.column("logprobs", index), found.column("logprobs", index)
        assert values.dtype == np.float32 and np.isnan(values[0])
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5)
    assert [whole for _, whole, _ in verify(out)] == [True]
    assert sorted(path.name for path in out.parent.glob("*tmp*")) == []
    assert references_cost(out) is None and not (out / "lineage.json").exists()


def test_the_manifest_names_the_model_and_nothing_that_is_not_known(
    asked, answer, load, text_corpus, caplog
):
    out = load([answer(request, "vllm") for request in asked], store_dtype="float16")
    references = References.open(out)
    references.check_matches(text_corpus)
    assert references.column("logprobs", 0).dtype == np.float16
    assert references.manifest["model_sha256"] is None
    assert references.manifest["scoring"] == {
        "served_model": "big",
        "store_dtype": "float16",
        "dtype": None,
        "attn_implementation": None,
        "device": None,
    }
    caplog.set_level(logging.WARNING, "slm.train")
    warn_of_other_precision(references, "32-true")
    assert caplog.messages == [
        f"{out} was scored in a precision that nobody knows, training computes in float32"
    ]


def test_parts_of_characters_that_are_not_shown_are_counted(
    asked, answer, load, text_corpus, tokenizer, caplog
):
    partial = 0
    for request in asked:
        partial += sum("\ufffd" in tokenizer.decode([t]) for t in request["body"]["prompt"])
    assert partial > 10
    load([answer(request, "lossy") for request in asked])
    assert any(text.startswith(f"{partial} tokens are parts of") for text in caplog.messages)


def test_finished_is_left_alone_and_another_model_is_refused(asked, answer, load, caplog):
    lines = [answer(request, "vllm") for request in asked]
    out = load(lines)
    caplog.set_level(logging.INFO, "slm.score")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert load(lines) == out
    assert caplog.messages[-1] == f"{out} is finished already, nothing to do"
    with pytest.raises(UserError, match="'served_model': 'big'.*'served_model': 'other'.* now"):
        load(lines, served_model="other")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_shard_that_was_lost_is_written_again(asked, answer, load):
    lines = [answer(request, "echo") for request in asked]
    out = load(lines)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "logprobs-00001.json").unlink()
    load(lines)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_line_given_twice_may_say_the_same(asked, answer, load):
    lines = [answer(request, "vllm") for request in asked]
    load(lines, lines[3:5])


# ---- what is refused ----------------------------------------------------------------------------


def inside(line: dict[str, Any]) -> dict[str, Any]:
    return line["response"]["body"]["choices"][0]


def shift(line: dict[str, Any]) -> None:
    """The log-probs one token to the left."""
    inside(line)["prompt_logprobs"] = [*inside(line)["prompt_logprobs"][1:], None]


def prepend(line: dict[str, Any]) -> None:
    """A server that puts a BOS before every prompt."""
    logprobs = inside(line)["logprobs"]
    logprobs["tokens"] = ["<s>", *logprobs["tokens"]]
    logprobs["token_logprobs"] = [None, -3.0, *logprobs["token_logprobs"][1:]]


def cut(line: dict[str, Any]) -> None:
    for name in ("tokens", "token_logprobs"):
        inside(line)["logprobs"][name] = inside(line)["logprobs"][name][:11]


def set_value(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(line: dict[str, Any]) -> None:
        inside(line)["logprobs"]["token_logprobs"][4] = value

    return change


def set_text(line: dict[str, Any]) -> None:
    inside(line)["logprobs"]["tokens"][4] += "x"


def set_id(line: dict[str, Any]) -> None:
    entries = inside(line)["prompt_logprobs"]
    entries[4] = {"7": next(iter(entries[4].values()))}


def other_prompt(line: dict[str, Any]) -> None:
    inside(line)["prompt_token_ids"] = [3] * 17


def more_alternatives(line: dict[str, Any]) -> None:
    inside(line)["prompt_logprobs"][4]["7"] = shown(-1.0)
    del inside(line)["logprobs"]


def fail(line: dict[str, Any]) -> None:
    line["response"] = {"status_code": 429, "body": {"error": {"message": "too many"}}}


def no_response(line: dict[str, Any]) -> None:
    line |= {"response": None, "error": {"code": "batch_expired"}}


def other_model(line: dict[str, Any]) -> None:
    line["response"]["body"]["model"] = "small"


def other_corpus(line: dict[str, Any]) -> None:
    line["custom_id"] = "0123456789ab-2"


def beyond(line: dict[str, Any]) -> None:
    line["custom_id"] = line["custom_id"].rpartition("-")[0] + "-40"


def no_logprobs(line: dict[str, Any]) -> None:
    inside(line)["logprobs"] = None


def two_choices(line: dict[str, Any]) -> None:
    line["response"]["body"]["choices"] *= 2


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ("vllm", shift, "position 0: log-prob is {.*null was expected"),
        (
            "vllm",
            set_id,
            r'position 4: token is {"7": {.*} in the answer, \d+ \'.*\' in the corpus',
        ),
        ("vllm", other_prompt, r"position 0: token is 3 in the answer, \d+ '.*' in the corpus"),
        ("vllm", more_alternatives, "position 4: prompt_logprobs has 2 alternatives and nothing"),
        ("echo", prepend, r"position 0: token is '<s>' in the answer, \d+ '.*' in the corpus"),
        ("echo", cut, "logprobs.tokens has 11 entries, the window has 17 tokens"),
        ("echo", set_text, r"position 4: token is '.*x' in the answer, \d+ '.*' in the corpus"),
        ("echo", set_value(0.01), "position 4: log-prob is 0.01, a number <= 0"),
        ("echo", set_value(None), "position 4: log-prob is None, a number <= 0"),
        ("echo", set_value(float("nan")), "position 4: log-prob is nan"),
        ("echo", set_value(float("-inf")), "position 4: log-prob is -inf"),
        ("echo", set_value(-9999.0), "log-prob is -9999.0, .* stands for -infinity"),
        ("echo", set_value("-1"), "position 4: log-prob is '-1'"),
        ("echo", fail, 'the server answered with an error: {"message": "too many"}'),
        ("echo", no_response, 'the server answered with an error: {"code": "batch_expired"}'),
        ("echo", other_model, "model is 'small', served_model is 'big'"),
        ("echo", no_logprobs, "has neither prompt_logprobs nor choices"),
        ("echo", two_choices, "choices is .*, one is needed"),
    ],
)
def test_a_wrong_answer_is_refused_with_its_place(asked, answer, load, shape, change, message):
    lines = [answer(request, shape) for request in asked[:4]]
    change(lines[2])
    with pytest.raises(UserError, match=f"0.jsonl line 3, window 2.*{message}") as caught:
        load(lines)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_corpus, "line 3: custom_id is '0123456789ab-2', that of a window of .* is like"),
        (beyond, "line 3: window 40 of 40 in the corpus"),
        (lambda line: line.pop("custom_id"), "line 3 has no custom_id"),
    ],
)
def test_a_window_that_is_none_of_the_corpus_is_refused(asked, answer, load, change, message):
    lines = [answer(request, "echo") for request in asked[:4]]
    change(lines[2])
    with pytest.raises(UserError, match=message):
        load(lines)


@pytest.mark.parametrize("shape", SHAPES)
def test_swapped_windows_are_refused(asked, answer, load, shape):
    lines = [answer(request, shape) for request in asked]
    lines[5]["custom_id"], lines[6]["custom_id"] = lines[6]["custom_id"], lines[5]["custom_id"]
    with pytest.raises(UserError, match="line 6, window 6, position 0: token is|position 1: token"):
        load(lines)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_wrong_token_anywhere_is_refused(asked, answer, load, shape):
    """The server read another token than the corpus has, and says so correctly."""
    for position in (1, 8, 16):
        other = copy.deepcopy(asked[0])
        prompt = other["body"]["prompt"]
        prompt[position] = (prompt[position] + 1) % 128  # both are whole characters or words
        with pytest.raises(UserError, match=f"window 0, position {position}: token is"):
            load([answer(other, shape)])


def test_a_line_cut_off_is_refused(tmp_path, asked, answer, load):
    text = json.dumps(answer(asked[0], "echo"))
    (tmp_path / "half.jsonl").write_text(text + "\n" + text[:100])
    with pytest.raises(UserError, match="half.jsonl line 2 is not valid JSON, cut off perhaps"):
        load(responses=[str(tmp_path / "half.jsonl")])


def test_missing_windows_are_counted_and_nothing_is_written(tmp_path, asked, answer, load):
    lines = [answer(request, "vllm") for request in asked]
    del lines[30], lines[7:9]
    before = {path.name for path in tmp_path.iterdir()}
    name = asked[7]["custom_id"]
    message = rf"3 of 40 windows have no answer, the first is window 7 \({name}\)"
    with pytest.raises(UserError, match=message):
        load(lines)
    assert {path.name for path in tmp_path.iterdir()} == before | {"0.jsonl"}


def test_a_window_given_twice_with_different_numbers_is_refused(asked, answer, load):
    lines = [answer(request, "echo") for request in asked]
    again = copy.deepcopy(lines[4])
    inside(again)["logprobs"]["token_logprobs"][16] = -1.5
    message = "1.jsonl line 1, window 4, position 16: log-prob is -1.5, another line .* has -"
    with pytest.raises(UserError, match=message):
        load(lines, [again])


def test_documents_are_not_for_servers(tmp_path, config, make_corpus):
    corpus = make_corpus(tmp_path / "d", [np.arange(33)], 8, "documents", [[0, 5]])
    change = {"corpus": str(corpus.folder), "requests": str(tmp_path / "r"), "served_model": "big"}
    with pytest.raises(UserError, match="packing 'documents', which no server can score"):
        made(OmegaConf.merge(config, change))
    assert not (tmp_path / "r").exists()


# ---- numbers --------------------------------------------------------------------------------


def test_rounding_above_zero_is_zero(asked, answer, load):
    lines = [answer(request, "echo") for request in asked]
    inside(lines[0])["logprobs"]["token_logprobs"][2] = 2e-7
    assert References.open(load(lines)).column("logprobs", 0)[2] == 0
    assert is_logprob(0) and is_logprob(-9998.9) and not is_logprob(1e-4) and not is_logprob(True)


def test_prompts_are_asked_as_they_are_and_get_no_score(
    tmp_path, config, answer, make_corpus, text_corpus
):
    tokens = [np.asarray(text_corpus.column("tokens", index)) for index in (0, 1)]
    masks = [np.arange(len(shard)) % 5 > 1 for shard in tokens]
    corpus = make_corpus(tmp_path / "sft", tokens, 16, masks=masks)
    config = OmegaConf.merge(config, {"corpus": str(corpus.folder)})
    requests = {"requests": str(tmp_path / "requests.jsonl"), "served_model": "big"}
    lines = made(OmegaConf.merge(config, requests)).read_text().splitlines()
    prompts = [json.loads(line)["body"]["prompt"] for line in lines]
    assert prompts[1] == tokens[0][16:33].tolist()
    answers = [json.dumps(answer(json.loads(line), "vllm")) for line in lines]
    (tmp_path / "answers.jsonl").write_text("\n".join(answers))
    change = {"responses": str(tmp_path / "answers.jsonl"), "served_model": "big"}
    imported = made(OmegaConf.merge(config, change | {"out": str(tmp_path / "there")}))
    change = {"reference_model": str(tmp_path / "model"), "out": str(tmp_path / "here")}
    own = References.open(made(OmegaConf.merge(config, change)))
    for index in (0, 1):
        found = References.open(imported).column("logprobs", index)
        np.testing.assert_allclose(found, own.column("logprobs", index), rtol=0, atol=2e-5)
        assert np.isnan(found[1:]).tolist() == (~masks[index][1:]).tolist()
