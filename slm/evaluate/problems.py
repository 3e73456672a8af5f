"""Problem files: a record becomes a question, a worked solution and an answer.

The nine sets of Table 1 of the Rho-1 paper, each in the format of its file in
math-evaluation-harness (`data/<set>/test.jsonl`), which is that of its authors as JSON lines.
"""

import ast
import json
import re
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from slm.errors import UserError
from slm.prepare.overlap import NGRAM, WORD
from slm.store.files import Json


class Problem(NamedTuple):
    question: str
    solution: str  # the worked solution; the answer where the set has none
    answer: str  # of choices the letter
    choices: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """The question with its choices: (A) 12, (B) 16."""
        if not self.choices:
            return self.question
        lettered = zip(string.ascii_uppercase, self.choices, strict=False)
        listed = ", ".join(f"({letter}) {choice}" for letter, choice in lettered)
        return f"{self.question}\nWhich choice is right?\n{listed}"


# ---- records ------------------------------------------------------------------------------------


def gsm8k(record: Json) -> Problem:
    solution, mark, answer = record["answer"].rpartition("####")
    if not mark:
        raise ValueError("answer has no ####")
    answer = answer.strip().replace(",", "")
    return Problem(record["question"].strip(), record["answer"], answer)


def math_500(record: Json) -> Problem:
    return Problem(record["problem"].strip(), record["solution"], record["answer"])


def svamp(record: Json) -> Problem:
    body = record["Body"].strip()
    body += "" if body.endswith((".", "?", "!")) else "."
    answer = decimal(record["Answer"])
    return Problem(f"{body} {record['Question'].strip()}", answer, answer)


def asdiv(record: Json) -> Problem:
    """Its answer is a value and, in brackets, its unit."""
    answer = re.sub(r"\(.*?\)", "", record["answer"]).strip()
    question = f"{record['body'].strip()} {record['question'].strip()}"
    return Problem(with_alternatives(question, answer), record["formula"], answer)


def mawps(record: Json) -> Problem:
    answer = decimal(record["target"])
    return Problem(record["input"].strip(), answer, answer)


def tabmwp(record: Json) -> Problem:
    title = f' "{record["table_title"]}"' if record["table_title"] else ""
    question = f"Read the table{title} and answer.\n{record['table']}\n{record['question'].strip()}"
    if record["choices"]:
        question += f" Choose from: {', '.join(record['choices'])}."
    answer = record["answer"].strip()
    return Problem(with_alternatives(question, answer), record["solution"], answer)


def mathqa(record: Json) -> Problem:
    question, options = record["problem"].strip(), record["options"].strip()
    if options.startswith("["):  # some are Python's way of writing a list
        options = " , ".join(ast.literal_eval(options))
    rationale = record["rationale"].strip('" ')
    return of_choices(question, split_options(options, "abcde"), record["correct"], rationale)


def sat_math(record: Json) -> Problem:
    options = split_options(record["options"].strip(), "ABCD")
    return of_choices(record["question"].strip(), options, record["Answer"])


def mmlu_stem(record: Json) -> Problem:
    options = [str(option).strip() for option in record["choices"]]
    letter = string.ascii_uppercase[record["answer"]]
    return of_choices(record["question"].strip(), options, letter)


def of_choices(question: str, choices: list[str], letter: str, rationale: str = "") -> Problem:
    answer = letter.strip().upper()
    if answer not in string.ascii_uppercase[: len(choices)]:
        raise ValueError(f"the answer is {letter!r}, there are {len(choices)} choices")
    solution = f"{rationale}\nThe answer is ({answer}).".strip()
    return Problem(question, solution, answer, tuple(choices))


def split_options(text: str, letters: str) -> list[str]:
    """'A) 1 B) 2', 'A. 1 B. 2' or 'a ) 1 , b ) b ) 2' -> ['1', '2']"""
    starts: list[re.Match[str]] = []
    for letter in letters:
        mark = re.compile(rf"(?:(?<=\s)|^)(?:{letter}\s?[).]\s+)+")
        found = mark.search(text, starts[-1].end() if starts else 0)
        if found is not None:
            starts.append(found)
    if len(starts) < 2 or starts[0].start() > 0:
        raise ValueError(f"options is {text!r}, expected {letters[0]}) ... {letters[1]}) ...")
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return [text[a.end() : b].strip().rstrip(" ,") for a, b in zip(starts, ends, strict=True)]


def with_alternatives(question: str, answer: str) -> str:
    """What may be said to a question of yes or no."""
    pairs = {"yes": "Yes or No", "no": "Yes or No", "true": "True or False"}
    pairs["false"] = pairs["true"]
    word = answer.casefold()
    return f"{question} ({pairs[word]})" if word in pairs else question


def decimal(number: float) -> str:
    """145.0 -> 145"""
    return str(int(number)) if number == int(number) else repr(number)


# ---- files --------------------------------------------------------------------------------------


class ProblemSet(NamedTuple):
    file: str
    name: str  # of its folder in math-evaluation-harness
    read: Callable[[Json], Problem]
    prompt: str  # the file of prompts/ with worked examples for it


SETS = {
    "gsm8k": ProblemSet("gsm8k_test.jsonl", "gsm8k", gsm8k, "words"),
    "math_500": ProblemSet("math_500.jsonl", "math_oai", math_500, "latex"),
    "svamp": ProblemSet("svamp.jsonl", "svamp", svamp, "words"),
    "asdiv": ProblemSet("asdiv.jsonl", "asdiv", asdiv, "words"),
    "mawps": ProblemSet("mawps.jsonl", "mawps", mawps, "words"),
    "tabmwp": ProblemSet("tabmwp.jsonl", "tabmwp", tabmwp, "words"),
    "mathqa": ProblemSet("mathqa.jsonl", "mathqa", mathqa, "choices"),
    "mmlu_stem": ProblemSet("mmlu_stem.jsonl", "mmlu_stem", mmlu_stem, "choices"),
    "sat_math": ProblemSet("sat_math.jsonl", "sat_math", sat_math, "choices"),
}


def find_file(folder: Path, one: ProblemSet) -> Path:
    """In a folder of files, or in the folder `data` of math-evaluation-harness."""
    paths = [folder / one.file, folder / one.name / "test.jsonl"]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(f"{paths[0]} is missing: problems must be the folder with the evaluation files")


def read_problems(path: Path, read: Callable[[Json], Problem]) -> list[Problem]:
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                problems.append(read_problem(line, f"{path}:{number}", read))
    return problems


def read_problem(line: bytes, where: str, read: Callable[[Json], Problem]) -> Problem:
    try:
        problem = read(json.loads(line))
        # An escape of half a character is JSON and no text.
        "".join([problem.asked, problem.solution, problem.answer]).encode()
    except KeyError as error:
        raise UserError(f"{where}: field {error} is missing") from None
    except (ValueError, TypeError, AttributeError, SyntaxError, IndexError) as error:
        raise UserError(f"{where}: {error}") from None
    return problem


# ---- prompts ------------------------------------------------------------------------------------


def few_shot_prompt(name: str) -> str:
    """Worked examples and, at the end, the place of the question; written for this project."""
    path = Path(__file__).parent / "prompts" / f"{name}.txt"
    return path.read_text(encoding="utf-8").removesuffix("\n")


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def check_prompt(prompt: str, problems: Iterable[Problem], path: Path) -> None:
    """No problem that is asked stands in the prompt: 13 words in a row, or all of a shorter one."""
    shown = f" {' '.join(words_of(prompt))} "
    for problem in problems:
        words = words_of(problem.question)
        size = min(NGRAM, len(words))
        for start in range(len(words) - size + 1 if words else 0):
            piece = " ".join(words[start : start + size])
            if f" {piece} " in shown:
                raise UserError(f"{path}: the prompt holds a problem that is asked: {piece!r}")
