"""lm_eval on our folders: log-likelihoods in closed form, filters on answers that are known."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import (
    Gemma3Config,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    XLNetConfig,
)

import warm
from gguf_helpers import write_gguf
from run_helpers import TINY_MODEL
from slm import harness as harness_door
from slm.checks import check
from slm.command_keys import HARNESS
from slm.errors import UserError
from slm.evaluate import harness as harnessing
from slm.evaluate.answers import NUMBER
from slm.evaluate.harness import check_room, harness, run_tasks
from slm.evaluate.problems import SETS, gsm8k, read_problems
from slm.evaluate.rows import loglikelihood_values, ratio
from slm.evaluate.tasks import BOXED, TASKS, Asked, expand_tasks, prompts, write_tasks
from slm.model.build import set_special_ids
from slm.model.folder import save_model
from text_helpers import DATA, needs_data

lm_eval_model = pytest.importorskip("lm_eval.api.model")
pytest.importorskip("math_verify")

V = 300
GSM8K = [
    {"question": "How many ducks?", "answer": "9 + 9 = <<9+9=18>>18 ducks.\n#### 18"},
    {"question": "How many eggs? ", "answer": "Two thousand less one.\n#### 1,999"},
    {"question": "How warm is it?", "answer": "It freezes.\n#### -5"},
]
MATH = [
    {"problem": "Halve it.", "solution": r"So $\boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}"},
    {"problem": "Where?", "solution": r"$\boxed{(3, \pi)}$", "answer": r"(3, \pi)"},
]
SVAMP = [
    {"Body": "There are 290 bananas", "Question": "How many in a group?", "Answer": 145.0},
    {"Body": "Tom ran. ", "Question": " How far? ", "Answer": 2.5},
]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def problems(tmp_path) -> Path:
    folder = tmp_path / "problems"
    folder.mkdir()
    write_lines(folder / "gsm8k_test.jsonl", GSM8K)
    write_lines(folder / "math_500.jsonl", MATH)
    write_lines(folder / "svamp.jsonl", SVAMP)
    return folder


def bigram_table(tokenizer: Any) -> np.ndarray:
    """Logits after each token: random, but greedy decoding after a colon says ' 18' and ends."""
    table = np.random.default_rng(0).normal(size=(V, V)) * 2
    chain = [*tokenizer.encode(": 18"), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain)
    for before, after in zip(chain, chain[1:], strict=False):
        table[before, after] = 20
    return table


def bigram(table: np.ndarray, **fields: Any) -> LlamaForCausalLM:
    """A Llama whose one layer adds nothing, so that its logits after token a are table[a]."""
    sizes: dict[str, Any] = {"hidden_size": V, "intermediate_size": 8, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **(sizes | heads | fields))).eval()
    with torch.no_grad():
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V) * 1e3)  # the norm makes it sqrt(V)
        model.lm_head.weight.copy_(torch.from_numpy(table.T / math.sqrt(V)))
    return model


@pytest.fixture
def table(tokenizer) -> np.ndarray:
    return bigram_table(tokenizer)


@pytest.fixture
def model(tmp_path, tokenizer, table) -> str:
    # Texts are longer than its positions: lm_eval scores them window by window.
    one = bigram(table, max_position_embeddings=40)
    set_special_ids(one, tokenizer)
    save_model(tmp_path / "model", one, tokenizer, "card", {})
    return str(tmp_path / "model")


@pytest.fixture(autouse=True)
def no_report_on_the_machine(monkeypatch) -> None:
    """lm_eval asks pip and the machine for their versions after every run, for a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def settings(problems: Path, **changes: Any) -> dict[str, Any]:
    defaults = {
        "problems": str(problems),
        "tasks": ["gsm8k", "math_500", "svamp"],
        "limit": None,
        "num_fewshot": 0,
        "prompt": "Question: {question}\nAnswer:",
        "batch_size": 2,
        "max_new_tokens": 8,
        "device": "cpu",
        "out": None,
    }
    return defaults | changes


def asked(problems: Path, **changes: Any) -> Asked:
    defaults: dict[str, Any] = {"prompt": "Q: {question}\nA:", "max_new_tokens": 8}
    return Asked(problems, {}, [], **(defaults | changes))


def values(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["metric"] + row["filter"].replace("none", "")): row for row in rows}


# ---- log-likelihoods ----------------------------------------------------------------------------


def chain_nats(table: np.ndarray, ids: list[int], first: int) -> float:
    """-log p of ids[first:], each after the token before it, in float64."""
    top = table.max(-1, keepdims=True)
    logprob = table - top - np.log(np.exp(table - top).sum(-1, keepdims=True))
    return -float(sum(logprob[ids[i - 1], ids[i]] for i in range(first, len(ids))))


def answer_nats(table: np.ndarray, tokenizer: Any, context: str, target: str) -> float:
    return chain_nats(table, tokenizer.encode(context + target), len(tokenizer.encode(context)))


def test_log_likelihoods_equal_the_closed_form(model, problems, table, tokenizer):
    rows = values(harness({"m": model}, **settings(problems, tasks=["gsm8k_answer", "svamp_text"])))
    answers = [" 18", " 1999", " -5"]
    contexts = [f"Question: {one['question'].strip()}\nAnswer:" for one in GSM8K]
    pairs = list(zip(contexts, answers, strict=True))
    nats = np.array([answer_nats(table, tokenizer, *pair) for pair in pairs])
    num_bytes = sum(len(answer) for answer in answers)
    found = rows["gsm8k_answer", "nats"]
    assert (found["model"], found["n"], found["num_fewshot"]) == ("m", 3, 0)
    assert found["value"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["stderr"] == pytest.approx(nats.std(ddof=1) / math.sqrt(3), rel=1e-4)
    bits = rows["gsm8k_answer", "bits_per_byte"]["value"]
    assert bits == pytest.approx(nats.sum() / math.log(2) / num_bytes, rel=1e-5)
    assert rows["gsm8k_answer", "acc"]["value"] == pytest.approx(1 / 3)  # 18 is what it says


def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path, model, problems, table, tokenizer):
    (tmp_path / "gguf").mkdir()
    one = bigram(table, max_position_embeddings=40)
    write_gguf(tmp_path / "gguf" / "m.gguf", one, tokenizer)
    asked = settings(problems, tasks=["gsm8k_answer", "gsm8k_generate"])
    rows = harness({"folder": model, "gguf": tmp_path / "gguf"}, **asked)
    by_model = [[row for row in rows if row["model"] == name] for name in ("folder", "gguf")]
    assert len(by_model[0]) > 5
    for known, found in zip(*by_model, strict=True):
        assert (known["task"], known["metric"]) == (found["task"], found["metric"])
        assert found["value"] == pytest.approx(known["value"], rel=1e-5)


def test_bits_per_byte_of_texts_equal_the_closed_form(model, problems, table, tokenizer):
    rows = values(harness({"m": model}, **settings(problems, tasks=["gsm8k_text", "svamp_text"])))
    texts = {
        "gsm8k_text": [f"{one['question'].strip()}\n{one['answer']}" for one in GSM8K],
        "svamp_text": [
            "There are 290 bananas. How many in a group?\n145",
            "Tom ran. How far?\n2.5",
        ],
    }
    for task, expected in texts.items():
        ids = [[tokenizer.eos_token_id, *tokenizer.encode(text)] for text in expected]
        assert task == "svamp_text" or max(len(one) for one in ids) > 41  # more than one window
        nats = sum(chain_nats(table, one, 1) for one in ids)
        num_bytes = sum(len(text.encode()) for text in expected)
        found = rows[task, "bits_per_byte"]
        assert found["value"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
        assert found["n"] == len(expected)


BOS = "\u0100"  # stands for byte 0, which is in no text here


@pytest.fixture
def adds_bos(tokenizer) -> PreTrainedTokenizerFast:
    """The same tokens; a post-processor puts a BOS first, as those of Llama, Gemma, Mistral do."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    pair = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, bos_token=BOS
    )


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_bos_that_the_tokenizer_adds_is_never_scored(
    tmp_path, problems, table, tokenizer, adds_bos, is_ours, monkeypatch
):
    """Ours saw none in training; one from elsewhere has it as context."""
    bos, eos = adds_bos.bos_token_id, adds_bos.eos_token_id
    assert adds_bos.encode("a") == [bos, *tokenizer.encode("a")]
    one = bigram(table, max_position_embeddings=40)
    set_special_ids(one, adds_bos)
    save_model(tmp_path / "model", one, adds_bos, "card", {})
    if not is_ours:
        (tmp_path / "model" / "slm.json").unlink()
    asked: list[list[int]] = []
    generate: Any = vars(GenerationMixin)["generate"]  # its type asks for more than a model has
    monkeypatch.setattr(
        LlamaForCausalLM,
        "generate",
        lambda self, input_ids, **rest: (
            asked.extend(input_ids.tolist()) or generate(self, input_ids, **rest)
        ),
    )
    tasks = ["svamp_text", "gsm8k_answer", "gsm8k_generate"]
    config = settings(problems, tasks=tasks, batch_size=1, max_new_tokens=2)
    rows = values(harness({"m": str(tmp_path / "model")}, **config))
    texts = ["There are 290 bananas. How many in a group?\n145", "Tom ran. How far?\n2.5"]
    before = eos if is_ours else bos
    nats = sum(chain_nats(table, [before, *tokenizer.encode(text)], 1) for text in texts)
    bits = rows["svamp_text", "bits_per_byte"]["value"]
    assert bits == pytest.approx(nats / math.log(2) / len("".join(texts)), rel=1e-5)
    contexts = [f"Question: {one['question'].strip()}\nAnswer:" for one in GSM8K]
    pairs = list(zip(contexts, [" 18", " 1999", " -5"], strict=True))
    answers = [answer_nats(table, tokenizer, *pair) for pair in pairs]
    assert rows["gsm8k_answer", "nats"]["value"] == pytest.approx(np.mean(answers), rel=1e-5)
    start = [] if is_ours else [bos]
    assert sorted(asked) == sorted([*start, *tokenizer.encode(text)] for text in contexts)


def test_bits_per_byte_is_what_lm_eval_itself_says(model, problems, monkeypatch):
    said: list[tuple[float, float]] = []

    def both(name: str, results: Any, rights: list[float]) -> list[Any]:
        mine = next(loglikelihood_values(results["samples"][name], "text"))
        said.append((results["results"][name]["bits_per_byte,none"], mine.value))
        return []

    monkeypatch.setattr(harnessing, "task_rows", both)
    harness({"m": model}, **settings(problems, tasks=["gsm8k_text", "math_500_text"]))
    theirs, mine = zip(*said, strict=True)
    assert theirs == pytest.approx(mine, rel=1e-12)


def test_space_at_the_prompts_end_is_scored_and_counted(model, problems, table, tokenizer):
    changes = {"tasks": ["gsm8k_answer"], "prompt": "{question}\n"}
    rows = values(harness({"m": model}, **settings(problems, **changes)))
    contexts = [one["question"].strip() for one in GSM8K]
    pairs = list(zip(contexts, ["\n18", "\n1999", "\n-5"], strict=True))
    nats = [answer_nats(table, tokenizer, *pair) for pair in pairs]
    assert rows["gsm8k_answer", "nats"]["value"] == pytest.approx(np.mean(nats), rel=1e-5)
    bits = rows["gsm8k_answer", "bits_per_byte"]["value"]
    assert bits == pytest.approx(sum(nats) / math.log(2) / 11, rel=1e-5)


def test_ratio_of_sums_and_its_error():
    value, stderr = ratio([2.0, 4.0, 9.0], [1.0, 2.0, 2.0])
    left_out = [13 / 4, 11 / 3, 6 / 3]  # the jackknife, by hand
    jackknife = math.sqrt(2 / 3 * sum((one - np.mean(left_out)) ** 2 for one in left_out))
    residuals = [2 - 3, 4 - 6, 9 - 6]
    assert value == 3.0
    assert stderr == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 5)
    assert stderr == pytest.approx(jackknife, rel=0.15)
    assert ratio([3.0], [2.0]) == (1.5, None)


# ---- generation ---------------------------------------------------------------------------------


def test_a_model_that_says_18_is_right_where_18_is_right(model, problems):
    rows = values(harness({"m": model}, **settings(problems, tasks=["gsm8k_generate"])))
    flexible = rows["gsm8k_generate", "exact_matchflexible-extract"]
    assert flexible["value"] == pytest.approx(1 / 3)
    assert flexible["stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))  # p(1 - p) / (n - 1)
    assert rows["gsm8k_generate", "exact_matchstrict-match"]["value"] == 0  # no ####


class Says(lm_eval_model.LM):
    """An LM that gives one completion to every problem, and keeps what it is asked."""

    def __init__(self, completion: str):
        super().__init__()
        self.completion = completion
        self.asked: list[tuple[str, Any]] = []

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.asked += [request.args for request in requests]
        return [self.completion for _ in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        self.asked += [request.args for request in requests]
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def right(tmp_path: Path, task: str, record: dict[str, Any], completion: str) -> dict[str, float]:
    """exact_match of each filter where a model says `completion`."""
    name = SETS[TASKS[task].set_name].file
    write_lines(tmp_path / name, [record])
    (tmp_path / "tasks").mkdir(exist_ok=True)
    write_tasks(tmp_path / "tasks", [task], asked(tmp_path))
    rows = run_tasks(Says(completion), tmp_path / "tasks", [task]).rows
    return {row["filter"]: row["value"] for row in rows if row["metric"] == "exact_match"}


@pytest.mark.parametrize(
    ("answer", "completion", "strict", "flexible"),
    [
        ("1,999", " 2,000 - 1 = 1,999.\n#### 1,999", 1, 1),
        ("1,999", "#### 1999", 1, 1),
        ("1,999", "#### $1,999.00", 1, 1),
        ("1,999", "It is $1,999.", 0, 1),
        ("1,999", "1,998", 0, 0),
        ("1,999", "1,2,1999", 0, 1),
        ("1,999", "#### 1,999\n\nAnother: 5 + 5\n#### 10", 1, 0),
        ("-5", "#### -5", 1, 1),
        ("-5", "3 - 8 = -5", 0, 1),
        ("5", "10-5", 0, 1),
        ("-5", "10-5", 0, 0),
        ("5", "(2+8)-5", 0, 1),
        ("-5", "5", 0, 0),
        ("2.5", "#### 2.5", 1, 1),
        ("2.5", "25", 0, 0),
        ("18", "eighteen", 0, 0),
        ("18", "", 0, 0),
        ("18", "18 apples and 3 pears", 0, 0),
    ],
)
def test_the_number_that_is_found(tmp_path, answer, completion, strict, flexible):
    record = {"question": "How many?", "answer": f"worked\n#### {answer}"}
    found = right(tmp_path, "gsm8k_generate", record, completion)
    assert found == {"strict-match": strict, "flexible-extract": flexible}


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (r"\frac{1}{2}", r"so $\boxed{\frac{1}{2}}$.", 1),
        (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}", 1),
        (r"\frac{1}{2}", r"first \boxed{3}, then \boxed{\frac{1}{2}}", 1),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", 0),
        (r"\frac{1}{2}", r"\frac{1}{2}", 0),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}", 0),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}", 1),
        (r"\sqrt{\frac{a}{b^{2}}}", r"\boxed{\sqrt{\frac{a}{b^{2}}}}", 1),
        ("-5", r"\boxed{-5}", 1),
        ("-5", r"\boxed{5}", 0),
        ("", "nothing", 0),
    ],
)
def test_the_box_that_is_found(tmp_path, answer, completion, expected):
    record = {"problem": "Halve it.", "solution": "s", "answer": answer}
    assert right(tmp_path, "math_500_generate", record, completion) == {"strict-match": expected}


def test_an_unclosed_box_takes_no_time():
    """Backtracking stays linear in what was generated."""
    pattern = BOXED[0]["filter"][0]["regex_pattern"]
    assert re.findall(pattern, r"\boxed{" + "a{" * 4 + "b" * 5000) == []
    assert re.findall(NUMBER, "1" * 5000) == ["1" * 5000]


def test_a_model_is_asked_the_prompt_and_stops_at_the_next_question(tmp_path, problems):
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks", ["svamp_generate"], asked(problems, limit=1))
    lm = Says("145")
    rows = run_tasks(lm, tmp_path / "tasks", ["svamp_generate"]).rows
    assert {row["filter"]: row["value"] for row in rows}["flexible-extract"] == 1
    ((context, options),) = lm.asked
    assert context == "Q: There are 290 bananas. How many in a group?\nA:"
    assert (options["until"], options["max_gen_toks"], options["do_sample"]) == (["Q:"], 8, False)


@pytest.mark.parametrize(
    ("task", "prompt", "expected"),
    [
        ("gsm8k_answer", "Q: {question}\nA:", "Q: {0}\nA: 18\n\nQ: {1}\nA: 1999\n\nQ: {2}\nA:"),
        ("gsm8k_answer", "{question}\n", "{0}\n18\n\n{1}\n1999\n\n{2}"),
        ("gsm8k_generate", "Q: {question}\nA:", "Q: {0}\nA: {a}\n\nQ: {1}\nA: {b}\n\nQ: {2}\nA:"),
        ("gsm8k_generate", "{question}\n", "{0}\n{a}\n\n{1}\n{b}\n\n{2}\n"),
    ],
)
def test_examples_stand_before_the_question_and_are_not_asked(
    tmp_path, problems, task, prompt, expected
):
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks", [task], asked(problems, prompt=prompt, num_fewshot=2))
    lm = Says("")
    rows = run_tasks(lm, tmp_path / "tasks", [task]).rows
    assert {(row["n"], row["num_fewshot"]) for row in rows} == {(1, 2)}
    questions = [one["question"].strip() for one in GSM8K]
    text = expected.format(*questions, a=GSM8K[0]["answer"], b=GSM8K[1]["answer"])
    assert [arguments[0] for arguments in lm.asked] == [text]
    if task == "gsm8k_answer":
        assert lm.asked[0][1] == ("\n-5" if prompt.endswith("\n") else " -5")


@pytest.mark.parametrize(
    ("completion", "match"),
    [
        (" 2 * 1,000 = 2,000, so the answer is 1,999 eggs.", 1),
        (" It is 1,998 + 1 = 1999.0", 1),
        (" The answer is 1,998.", 0),
        (" nothing", 0),
    ],
)
def test_generations_are_compared_as_values_after_our_own_examples(tmp_path, completion, match):
    write_lines(tmp_path / "gsm8k_test.jsonl", GSM8K[1:2])
    (tmp_path / "tasks").mkdir()
    tasks = ["gsm8k_cot", "gsm8k_generate"]
    write_tasks(tmp_path / "tasks", tasks, asked(tmp_path))
    lm = Says(completion)
    found = run_tasks(lm, tmp_path / "tasks", tasks)
    rows = {(row["task"], row["metric"]): row for row in found.rows}
    cot = rows["gsm8k_cot", "value_match"]
    assert (cot["value"], cot["n"], cot["num_fewshot"]) == (match, 1, 8)
    assert rows["gsm8k_generate", "value_match"]["value"] == match
    assert ("gsm8k_cot", "exact_match") not in rows
    (context, options), (bare, _) = lm.asked
    assert context.startswith("Question: A baker") and context.count("Question:") == 9
    assert context.endswith("\n\nQuestion: How many eggs?\nAnswer:")
    assert bare == "Q: How many eggs?\nA:" and options["until"] == ["Question:"]
    said = [(one["task"], one["problem"], one["completion"]) for one in found.completions]
    assert said == [(task, 0, completion) for task in tasks]
    assert {one["answer"] for one in found.completions} == {"1999"}


SAT = [
    {"question": "2 + 2?", "options": "A) 5 B) 4 C) 4.0", "Answer": "B"},
    {"question": "Where?", "options": "A) [1,2] B) (1,2]", "Answer": "A"},
]


def test_a_choice_is_asked_with_its_letters_and_scored_without(tmp_path, model, table, tokenizer):
    write_lines(tmp_path / "sat_math.jsonl", SAT)
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks", ["sat_math_cot", "sat_math_generate"], asked(tmp_path))
    lm = Says(" The answer is (C).")
    found = run_tasks(lm, tmp_path / "tasks", ["sat_math_generate", "sat_math_cot"])
    assert [row["value"] for row in found.rows] == [0.5, 0.5]  # 4.0 is 4; there is no other C
    assert lm.asked[0][0] == "Q: 2 + 2?\nWhich choice is right?\n(A) 5, (B) 4, (C) 4.0\nA:"
    assert lm.asked[2][1]["until"] == ["Problem:"]
    assert lm.asked[2][0].endswith("(A) 5, (B) 4, (C) 4.0\nSolution:")
    config = settings(tmp_path, tasks=["sat_math_answer"], prompt="Q: {question}\nA:")
    rows = values(harness({"m": model}, **config))
    texts = [["5", "4", "4.0"], ["[1,2]", "(1,2]"]]
    nats = [
        [answer_nats(table, tokenizer, f"Q: {one['question']}\nA:", f" {text}") for text in choices]
        for one, choices in zip(SAT, texts, strict=True)
    ]
    right = [nats[0][1], nats[1][0]]
    acc = [right[0] == min(nats[0]), right[1] == min(nats[1])]
    assert rows["sat_math_answer", "acc"]["value"] == np.mean(acc)
    assert rows["sat_math_answer", "nats"]["value"] == pytest.approx(np.mean(right), rel=1e-5)
    bits = rows["sat_math_answer", "bits_per_byte"]["value"]
    assert bits == pytest.approx(sum(right) / math.log(2) / len(" 4 [1,2]"), rel=1e-5)


def test_a_problem_in_the_prompt_is_refused(model, problems, monkeypatch):
    monkeypatch.setattr(harnessing, "load_lm", None)
    prompt = "Q: Tom ran. How far?\nA: 2.5\n\nQ: {question}\nA:"
    config = settings(problems, tasks=["svamp_generate"], prompt=prompt)
    with pytest.raises(UserError, match="svamp.jsonl: the prompt holds a problem that is asked: '"):
        harness({"m": model}, **config)
    with pytest.raises(UserError, match="each prompt has"):  # the one that it holds is not asked
        harness({"m": model}, **config | {"limit": 1})


def test_a_set_may_lie_elsewhere(tmp_path, problems):
    write_lines(tmp_path / "other.jsonl", SVAMP[1:])
    (tmp_path / "tasks").mkdir()
    there = asked(problems)._replace(files={"svamp": str(tmp_path / "other.jsonl")})
    write_tasks(tmp_path / "tasks", ["svamp_answer", "gsm8k_answer"], there)
    lm = Says("")
    run_tasks(lm, tmp_path / "tasks", ["svamp_answer", "gsm8k_answer"])
    questions = ["Tom ran. How far?", *(one["question"].strip() for one in GSM8K)]
    assert [context for context, _ in lm.asked] == [f"Q: {one}\nA:" for one in questions]
    for files, message in [
        ({"gsm9k": "a"}, "files has 'gsm9k', known are gsm8k, .* and blimp"),
        ({"svamp": "no.jsonl"}, "no.jsonl is no file: files.svamp must be one"),
    ]:
        with pytest.raises(UserError, match=message):
            write_tasks(tmp_path / "tasks", ["svamp_answer"], there._replace(files=files))


# ---- pairs --------------------------------------------------------------------------------------


def test_the_likelier_sentence_by_phenomenon_and_paradigm(tmp_path, model, table, tokenizer):
    pairs = [("He is.", "He are."), ("A dog", "A cat"), ("same", "same"), ("b c", "c b")]
    groups = ["x/a", "x/a", "x/b", "y/c"]
    for (good, bad), group in zip(pairs, groups, strict=True):
        term, uid = group.split("/")
        record = {"sentence_good": good, "sentence_bad": bad, "linguistics_term": term, "UID": uid}
        (tmp_path / "blimp").mkdir(exist_ok=True)
        with open(tmp_path / "blimp" / f"{uid}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    rows = values(harness({"m": model}, **settings(tmp_path, tasks=["blimp"])))
    eos = tokenizer.eos_token_id
    nats = [[chain_nats(table, [eos, *tokenizer.encode(t)], 1) for t in pair] for pair in pairs]
    accs = [float(good < bad) for good, bad in nats]
    assert accs[2] == 0  # a tie is no success
    expected = {"blimp": accs, "blimp/x": accs[:3], "blimp/x/a": accs[:2], "blimp/x/b": accs[2:3]}
    expected |= {"blimp/y": accs[3:], "blimp/y/c": accs[3:]}
    found = {task: row for (task, metric), row in rows.items() if metric == "acc"}
    assert {task: row["value"] for task, row in found.items()} == {
        task: pytest.approx(np.mean(values)) for task, values in expected.items()
    }
    assert {task: row["n"] for task, row in found.items()} == {
        task: len(values) for task, values in expected.items()
    }
    good = sum(one[0] for one in nats)
    size = len("".join(pair[0] for pair in pairs))
    bits = rows["blimp", "bits_per_byte"]["value"]
    assert bits == pytest.approx(good / math.log(2) / size, rel=1e-5)


def test_the_storys_own_ending_is_the_likeliest(tmp_path, model, table, tokenizer):
    endings = ["18", "a", "bc", "d e"]
    stories = [{"text": f"It was {n}. So: {end}"} for n, end in enumerate(endings)]
    write_lines(tmp_path / "s.jsonl", stories)
    source, samples = {"path": str(tmp_path / "s.jsonl")}, tmp_path / "samples.jsonl"
    config = settings(tmp_path, tasks=["completion"]) | {"problems": None}
    rows = values(harness({"m": model}, **config, stories=[source], samples=samples))
    endings = [f" So: {end}" for end in endings]
    nats = np.array(
        [
            [answer_nats(table, tokenizer, f"It was {n}.", ending) for ending in endings]
            for n in range(4)
        ]
    )
    lengths = np.array([len(ending) for ending in endings])
    own = np.arange(4)
    assert rows["completion", "acc"]["value"] == np.mean(nats.argmin(1) == own)
    assert rows["completion", "acc_norm"]["value"] == np.mean((nats / lengths).argmin(1) == own)
    bits = rows["completion", "bits_per_byte"]["value"]
    assert bits == pytest.approx(np.trace(nats) / math.log(2) / lengths.sum(), rel=1e-5)
    assert samples.read_text() == ""  # nothing is generated
    with pytest.raises(UserError, match="problems is null: the folder with the files of blimp is"):
        harness({"m": model}, **config | {"tasks": ["blimp"]})


# ---- what it reads ------------------------------------------------------------------------------


def test_sets_mean_all_their_tasks_and_each_is_run_once():
    assert expand_tasks(["svamp_text", "svamp", "gsm8k_answer"]) == [
        "svamp_text",
        "svamp_answer",
        "svamp_generate",
        "gsm8k_answer",
    ]
    assert expand_tasks(["rho1"]) == [f"{name}_cot" for name in SETS] and len(SETS) == 9
    with pytest.raises(
        UserError, match="tasks has 'gsm9k', known are gsm8k, math_500, svamp, .* a"
    ):
        expand_tasks(["gsm9k"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"gsm8k_test.jsonl:2: Expecting property name"),
        ('{"question": "a"}', r"gsm8k_test.jsonl:2: field 'answer' is missing"),
        ('{"question": "a", "answer": "b"}', r"gsm8k_test.jsonl:2: answer has no ####"),
        ('{"question": "a", "answer": 3}', r"gsm8k_test.jsonl:2: "),
        ("[]", r"gsm8k_test.jsonl:2: "),
        (
            '{"question": "\\ud800", "answer": "#### 3"}',
            r"gsm8k_test.jsonl:2: .*surrogates not allow",
        ),
    ],
)
def test_a_damaged_record_is_named(tmp_path, line, message):
    path = tmp_path / "gsm8k_test.jsonl"
    path.write_text(json.dumps(GSM8K[0]) + f"\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_problems(path, gsm8k)


def test_what_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "gsm8k_test.jsonl"
    path.write_bytes(b'{"question": "caf\xe9", "answer": "#### 3"}\n')
    with pytest.raises(UserError, match="gsm8k_test.jsonl:1: 'utf-8' codec can't decode byte 0xe9"):
        read_problems(path, gsm8k)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_lines_end_where_json_lines_do(tmp_path, sign):
    """Python's splitlines ends them at other signs too, which JSON allows within or between."""
    one = json.dumps(GSM8K[0], ensure_ascii=False).replace("How many", f"How{sign}many")
    path = tmp_path / "gsm8k_test.jsonl"
    path.write_bytes(f"{one}\r\n\n{json.dumps(GSM8K[1])}".encode())
    if sign < " ":  # JSON refuses it within a text, in one sentence about the whole line
        with pytest.raises(UserError, match="gsm8k_test.jsonl:1: Invalid control character"):
            read_problems(path, gsm8k)
    else:
        asked = [problem.question for problem in read_problems(path, gsm8k)]
        assert asked == [f"How{sign}many ducks?", "How many eggs?"]


# ---- mistakes -----------------------------------------------------------------------------------


def test_wrong_folders_are_refused_before_any_model_is_loaded(
    model, problems, tmp_path, monkeypatch
):
    monkeypatch.setattr(harnessing, "load_lm", None)
    with pytest.raises(UserError, match="model no/such is no model folder: there is no such"):
        harness({"a": model, "b": "no/such"}, **settings(problems))
    with pytest.raises(
        UserError, match="max_new_tokens is 40, it must be less than the 40 max_pos"
    ):
        harness({"a": model}, **settings(problems, max_new_tokens=40))
    with pytest.raises(UserError, match=r"svamp.jsonl has 2 problems, num_fewshot is 2: none is"):
        harness({"a": model}, **settings(problems, tasks=["svamp"], num_fewshot=2))
    (problems / "svamp.jsonl").unlink()
    with pytest.raises(UserError, match=r"svamp.jsonl is missing: problems must be the folder"):
        harness({"a": model}, **settings(problems))
    assert not list(Path(tmp_path).glob("slm-harness-*"))


def test_the_room_is_what_the_text_part_of_a_config_says(tmp_path):
    Gemma3Config(text_config={"max_position_embeddings": 40}).save_pretrained(tmp_path / "gemma")
    check_room(str(tmp_path / "gemma"), ["gsm8k_cot"], 39)
    check_room(str(tmp_path / "gemma"), ["blimp", "gsm8k_answer"], 256)  # nothing is generated
    with pytest.raises(UserError, match="max_new_tokens is 40, it must be less than the 40 max"):
        check_room(str(tmp_path / "gemma"), ["blimp", "gsm8k_cot"], 40)
    XLNetConfig().save_pretrained(tmp_path / "xlnet")  # -1 stands for any length
    check_room(str(tmp_path / "xlnet"), ["gsm8k_cot"], 10**6)


def test_prompts_that_lm_eval_would_cut(model, problems, tokenizer, monkeypatch, caplog):
    """All of a task: refused before a forward; some: said at the end."""
    lengths = sorted(
        len(tokenizer.encode(f"Question: {one['question'].strip()}\nAnswer:")) for one in GSM8K
    )
    assert lengths[0] < lengths[-1] < 40
    some = settings(problems, tasks=["gsm8k_generate"], max_new_tokens=40 - lengths[0])
    assert harness({"m": model}, **some)
    cut = sum(length > lengths[0] for length in lengths)
    assert f"gsm8k_generate: {cut} of 3 prompts, the longest of {lengths[-1]} tok" in caplog.text
    caplog.clear()
    harness({"m": model}, **(some | {"max_new_tokens": 40 - lengths[-1]}))
    assert "prompts" not in caplog.text
    monkeypatch.setattr(harnessing, "load_lm", None)
    room = f"over the {lengths[0] - 1} positions that max_new_tokens={41 - lengths[0]} leaves of 40"
    with pytest.raises(UserError, match=f"each prompt has {lengths[0]} tokens or more, {room}"):
        harness({"m": model}, **(some | {"max_new_tokens": 41 - lengths[0]}))
    for task, advised in (
        ("gsm8k_cot", "8 worked examples are fixed, ask gsm8k_generate with num_fewshot=0"),
        ("gsm8k_answer", "over the 40 positions in .*: set num_fewshot=0"),
    ):
        with pytest.raises(UserError, match=advised):
            harness({"m": model}, **settings(problems, tasks=[task], num_fewshot=2))


@pytest.mark.parametrize("prompt", ["Q: {question}\nA:", "{question}\n"])
@pytest.mark.parametrize("name", ["gsm8k_generate", "gsm8k_cot"])
def test_prompts_are_counted_as_lm_eval_asks_them(tmp_path, problems, name, prompt):
    config, lm = asked(problems, num_fewshot=1, prompt=prompt), Says("18")
    write_tasks(tmp_path, [name], config)
    run_tasks(lm, tmp_path, [name])
    assert prompts(tmp_path, name, config) == [text for text, _ in lm.asked]


def test_a_damaged_model_is_one_sentence(model, problems):
    weights = Path(model) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        harness({"a": model}, **settings(problems))
    (Path(model) / "slm.json").unlink()  # as from elsewhere, without hashes
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        harness({"a": model}, **settings(problems))
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights of LlamaForCausalLM, .*model.norm.weight"):
        harness({"a": model}, **settings(problems))
    (Path(model) / "config.json").write_text("{")
    with pytest.raises(UserError, match="model .* has a damaged config.json: |no causal LM at"):
        harness({"a": model}, **settings(problems))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, r"models is {}, it must be {name: folder, ...}"),
        ({"models": ["m"]}, r"models is \['m'\], it must be"),
        ({"tasks": "gsm8k"}, "tasks is 'gsm8k', it must be a list"),
        ({"tasks": []}, r"tasks is \[\], it must be a list"),
        ({"limit": 0}, "limit is 0, it must be a whole number of at least 1"),
        ({"limit": 0.5}, "limit is 0.5, it must be a whole number"),
        ({"batch_size": "auto"}, "batch_size is 'auto', it must be a whole number"),
        ({"num_fewshot": -1}, "num_fewshot is -1, it must be a whole number of at least 0"),
        ({"prompt": "Answer:"}, "prompt is 'Answer:', it must be a text with {question} in it"),
        ({"out": "."}, "out is '.', it must be a file, no folder"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, message):
    config = settings(tmp_path, **({"models": {"a": "m"}} | changes))
    with pytest.raises(UserError, match=message):
        check(config, HARNESS)


def test_without_lm_eval_it_says_what_to_install(call, monkeypatch, tmp_path):
    monkeypatch.setattr(harnessing, "find_spec", lambda name: None)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    words = [f"models={{a: '{tmp_path}'}}", f"problems='{tmp_path}'"]
    message = "slm x: lm_eval is not installed: pip install 'slm-trainer[lm-eval]'\n"
    assert call(harness_door.main, *words) == (1, "", message.replace("slm x", "slm harness"))


def test_the_module_itself_imports_neither_lm_eval_nor_torch():
    code = "import sys, slm.harness; assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the command --------------------------------------------------------------------------------

NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    open({marker!r}, "a").write(repr(arguments))
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.mark.slow
@needs_data
def test_a_trained_folder_goes_through_on_real_files_without_a_network(tmp_path):
    (tmp_path / "site").mkdir()
    marker = tmp_path / "reached"
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK.format(marker=str(marker)))
    reach = "import socket; socket.create_connection(('localhost', 9))"
    assert python(tmp_path, "-c", reach).returncode == 1 and marker.exists()  # it is seen
    marker.unlink()
    raw = f"{{path: '{DATA}/eval/gsm8k_test.jsonl', text: \"{{question}}\\n{{answer}}\"}}"
    prepare = ["prepare", "out=corpus", f"sources=[{raw}]", "tokenizer.vocab_size=400"]
    run_command(tmp_path, *prepare, "seq_len=64", "heldout_ratio=0")
    train = ["train", "out=run", "data.corpus=corpus/train", "selection=all", "logger=csv"]
    train += ["max_tokens=1024", "data.batch_size=8", "data.micro_batch_size=4", *TINY_MODEL]
    run_command(tmp_path, *train, "data.num_workers=0")
    assert "NOT WHOLE" not in run_command(tmp_path, "verify", "run")
    words = ["models={a: run/model, b: run/model}", f"problems='{DATA}/eval'", "limit=4"]
    words += ["max_new_tokens=4", "out=table.csv"]
    done = python(tmp_path, "-m", "slm.cli", "harness", *words)
    assert done.returncode == 0, done.stderr
    assert not marker.exists(), marker.read_text()
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    per_model = 3 * 4 + 2 + 1 + 2 + 3  # acc, nats, bits of answers, bits of texts; matches, values
    assert [row["model"] for row in rows] == ["a"] * per_model + ["b"] * per_model
    assert {row["n"] for row in rows} == {"4"}
    for mine, other in zip(rows[:per_model], rows[per_model:], strict=True):
        assert mine | {"model": "b"} == other  # the same model twice
        assert mine["task"] in done.stdout and float(mine["stderr"]) >= 0
        if mine["metric"] == "bits_per_byte":
            assert 4 < float(mine["value"]) < 10  # log2(400) bits a token at first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corpus", "run", "site", "table.csv",
    ]  # fmt: skip


RUN = """
import runpy
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_command(folder: Path, *words: str) -> str:
    """A command in a fork, where reaching for a network leaves a mark."""
    code = (folder / "site" / "sitecustomize.py").read_text() + RUN
    command = [sys.executable, "-c", code, f"slm.{words[0]}", *words[1:]]
    done = warm.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """As a person would run it, where reaching for a network leaves a mark."""
    paths = [str(folder / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment = kept | {"PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "offline"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
