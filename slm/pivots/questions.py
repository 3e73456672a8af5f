"""Problems, their prompts as token ids, and what counts as success.

A line of `problems` is a record with `question` and `answer` (`choices` too, where the answer is
the letter of one, and `id`), or of one of the sets that `slm harness` reads (`format`).

An oracle is asked with the problem and the text of the whole completion, without prompt and EOS:
`answer` compares the answer in it with the problem's as values (slm/evaluate/answers.py), and
`module:function`, or `file.py:function`, is called with the record and the text.
"""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from slm.errors import UserError, shown
from slm.evaluate.answers import extract, is_right
from slm.evaluate.generation import first_ids
from slm.evaluate.problems import SETS, Problem, read_problem
from slm.selection.registry import import_file
from slm.store.files import Json, hash_file, hash_json

KEY_CHARACTERS = 16
BARE_PROMPT = "{question}"


class Question(NamedTuple):
    key: str  # of the record and its prompt's ids: one that says something else is another
    id: str
    record: Json
    problem: Problem
    prompt_ids: list[int]


# ---- problems -----------------------------------------------------------------------------------


def plain_problem(record: Json) -> Problem:
    """An oracle of one's own needs no answer."""
    answer = str(record["answer"]) if "answer" in record else ""
    choices = tuple(map(str, record["choices"])) if "choices" in record else ()
    return Problem(str(record["question"]).strip(), answer, answer, choices)


def read_questions(
    path: str, form: str | None, limit: int | None, encode: Callable[[str], list[int]]
) -> list[Question]:
    read = plain_problem if form is None else SETS[form].read
    found: dict[str, Question] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and (limit is None or len(found) < limit):
                one = question(line, f"{path}:{number}", number, read, encode)
                if one.id in found:
                    raise UserError(
                        f"{path}:{number}: id is {one.id!r}, and so is an earlier one's"
                    )
                found[one.id] = one
    if not found:
        raise UserError(f"problems: {path} has none")
    return [*found.values()]


def question(
    line: bytes,
    where: str,
    number: int,
    read: Callable[[Json], Problem],
    encode: Callable[[str], list[int]],
) -> Question:
    problem = read_problem(line, where, read)
    record = json.loads(line)
    prompt_ids = encode(problem.asked)
    key = hash_json([record, prompt_ids])[:KEY_CHARACTERS]
    name = str(record["id"]) if "id" in record else str(number)
    return Question(key, name, record, problem, prompt_ids)


def encoder(folder: str, tokenizer: Any, prompt: str | None) -> Callable[[str], list[int]]:
    """A question's text -> the ids that the model is given. prompt: None is the chat template."""
    before = first_ids(folder, tokenizer)

    def as_text(asked: str) -> list[int]:
        text = (prompt or BARE_PROMPT).replace(BARE_PROMPT, asked)
        return [*before, *tokenizer.encode(text, add_special_tokens=False)]

    def as_chat(asked: str) -> list[int]:
        chat = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ids if ids[: len(before)] == before else [*before, *ids]

    return as_chat if prompt is None and tokenizer.chat_template is not None else as_text


# ---- oracles ------------------------------------------------------------------------------------


def by_answer(one: Question, text: str) -> bool:
    problem = one.problem
    return is_right(extract(text, len(problem.choices)), problem.answer, problem.choices)


class Judge:
    """An oracle, asked once for each text of a question."""

    def __init__(self, oracle: str):
        self.oracle = oracle
        self.known: dict[tuple[str, str], bool] = {}
        self.function = None if oracle == "answer" else load_function(oracle)

    def identity(self) -> str:
        """What its verdicts depend on: for a function of a file, that file."""
        name = self.oracle.rpartition(":")[0]
        return f"{self.oracle} {hash_file(Path(name))}" if name.endswith(".py") else self.oracle

    def __call__(self, one: Question, text: str) -> bool:
        key = one.key, text
        if key not in self.known:
            self.known[key] = self.ask(one, text)
        return self.known[key]

    def ask(self, one: Question, text: str) -> bool:
        if self.function is None:
            return by_answer(one, text)
        try:
            found = self.function(one.record, text)
        except Exception as error:
            raise UserError(
                f"oracle {self.oracle} raised {type(error).__name__} ({error}) on problem "
                f"{one.id}, completion {shown(text)}"
            ) from error
        if found is not True and found is not False:
            raise UserError(
                f"oracle {self.oracle} returned {shown(found)} on problem {one.id}, it must be "
                "True or False"
            )
        return found

    def check(self, questions: list[Question]) -> None:
        if self.function is None:
            for one in questions:
                if not one.problem.answer:
                    raise UserError(f"problem {one.id} has no answer, which oracle=answer compares")


def load_function(oracle: str) -> Callable[[Mapping[str, Any], str], Any]:
    name, colon, function = oracle.rpartition(":")
    if not colon or not name or not function:
        raise UserError(
            f"oracle is {oracle!r}, it must be answer, module:function or file.py:function"
        )
    found = vars(load_module(oracle, name))
    if function not in found or not callable(found[function]):
        raise UserError(f"oracle is {oracle!r}, and {name} has no function {function}")
    return found[function]


def load_module(oracle: str, name: str) -> ModuleType:
    if name.endswith(".py") and not Path(name).is_file():
        raise UserError(f"oracle is {oracle!r}, and there is no file {name}")
    try:
        return import_file(Path(name).resolve()) if name.endswith(".py") else import_module(name)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"oracle is {oracle!r}, and {name} cannot be imported ({reason})"
        ) from error
