"""Problems become prompts as their model knows them, and completions right or wrong."""

import json

import pytest

from slm.evaluate.problems import Problem
from slm.pivots.questions import Judge, Question, encoder, read_questions

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def asked(answer: str, *choices: str) -> Question:
    return Question("k", "1", {"answer": answer}, Problem("?", answer, answer, choices), [1])


@pytest.mark.parametrize(
    ("text", "one", "right"),
    [
        ("So it is 1,999.", asked("1999"), True),
        ("The answer is \\boxed{\\frac{2}{4}}", asked("0.5"), True),
        ("It was 1999, and then 2000", asked("1999"), False),
        ("the answer is (B)", asked("B", "12", "16"), True),
        ("the answer is 16", asked("B", "12", "16"), True),
        ("the answer is 12", asked("B", "12", "16"), False),
        ("", asked("1999"), False),
    ],
)
def test_answers_are_compared_as_values(text, one, right):
    judge = Judge("answer")
    assert judge(one, text) is right
    assert judge.known == {("k", text): right}  # and asked once


def test_prompts_are_texts_or_chats(tmp_path, bytes_folder):
    from slm.store.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bytes_folder)
    ids, eos = tokenizer.encode, tokenizer.eos_token_id
    assert encoder(bytes_folder, tokenizer, None)("1+1=") == ids("1+1=")
    assert encoder(bytes_folder, tokenizer, "Q {question}\nA")("x") == ids("Q x\nA")
    (tmp_path / "slm.json").write_text("{}")  # a text begins behind an EOS there
    assert encoder(str(tmp_path), tokenizer, None)("1+1=") == [eos, *ids("1+1=")]
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token = tokenizer.eos_token
    chat = [eos, *ids("<user>1+1=<assistant>")]
    assert encoder(bytes_folder, tokenizer, None)("1+1=") == chat
    assert encoder(str(tmp_path), tokenizer, None)("1+1=") == chat  # one EOS, not two
    assert encoder(str(tmp_path), tokenizer, "{question}")("1+1=") == [eos, *ids("1+1=")]


def test_a_file_of_a_set_and_one_of_ones_own(tmp_path):
    path = tmp_path / "p.jsonl"
    own = {"question": " 1+1= ", "answer": 2, "id": 7, "level": "easy"}
    path.write_text(json.dumps(own) + "\n\n" + json.dumps({"question": "a", "answer": "b"}))
    first, second = read_questions(str(path), None, None, lambda text: [len(text)])
    assert (first.id, second.id) == ("7", "3") and first.key != second.key
    assert (first.problem.answer, first.prompt_ids, first.record) == ("2", [4], own)
    assert read_questions(str(path), None, 1, lambda text: [len(text)]) == [first]
    (again,) = read_questions(str(path), None, 1, lambda text: [5])
    assert again.key != first.key  # another prompt is another question
    path.write_text(json.dumps({"question": "How many?", "answer": "6*7\n#### 42"}))
    (one,) = read_questions(str(path), "gsm8k", None, lambda text: [])
    assert one.problem.answer == "42"
