"""Problem files as tasks of lm_eval: what is asked, what counts as an answer, how it is scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from slm.errors import UserError
from slm.store.files import Json

BARE_PROMPT = "{question}"


class Problem(NamedTuple):
    question: str
    solution: str  # the worked solution; the answer where the set has none
    answer: str


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


def decimal(number: float) -> str:
    """145.0 -> 145"""
    return str(int(number)) if number == int(number) else repr(number)


def read_problems(path: Path, read: Callable[[Json], Problem]) -> list[Problem]:
    if not path.is_file():
        raise UserError(f"{path} is missing: problems must be the folder with the evaluation files")
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                problems.append(read_problem(line, f"{path}:{number}", read))
    return problems


def read_problem(line: bytes, where: str, read: Callable[[Json], Problem]) -> Problem:
    try:
        problem = read(json.loads(line))
        "".join(problem).encode()  # an escape of half a character is JSON and no text
    except KeyError as error:
        raise UserError(f"{where}: field {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {error}") from None
    return problem


# A minus after a digit or a bracket subtracts. A comma counts between groups of three digits.
NUMBER = r"(?:(?<![\d)\]])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"


def balanced(depth: int) -> str:
    """A regex for text whose braces match, at most `depth` deep."""
    inner = balanced(depth - 1) if depth else ""
    return rf"(?:[^{{}}]|\{{{inner}\}})*" if depth else r"[^{}]*"


def regex(name: str, pattern: str, which: int) -> Json:
    """lm_eval's filter of that name: match number `which` of the pattern, else [invalid]."""
    find = {"function": "regex", "regex_pattern": pattern, "group_select": which}
    return {"name": name, "filter": [find, {"function": "take_first"}]}


NUMBERS = [
    regex("strict-match", rf"####\s*({NUMBER})", 0),
    regex("flexible-extract", NUMBER, -1),
]


BOXED = [regex("strict-match", rf"\\boxed\s*\{{({balanced(5)})\}}", -1)]


# Removed from both sides before they are compared. \dfrac and \tfrac are \frac.
IGNORED_IN_NUMBERS = [",", r"\$", r"\.0*$"]


IGNORED_IN_LATEX = [r"\\left|\\right|\\[,!;: ]|\\?\$|\s|\.$", r"(?<=\\)[dt](?=frac)"]


class ProblemSet(NamedTuple):
    file: str
    read: Callable[[Json], Problem]
    filters: list[Json]
    ignored: list[str]


OUTPUT_TYPES = {
    "answer": "loglikelihood",
    "text": "loglikelihood_rolling",
    "generate": "generate_until",
}


SETS = {
    "gsm8k": ProblemSet("gsm8k_test.jsonl", gsm8k, NUMBERS, IGNORED_IN_NUMBERS),
    "math_500": ProblemSet("math_500.jsonl", math_500, BOXED, IGNORED_IN_LATEX),
    "svamp": ProblemSet("svamp.jsonl", svamp, NUMBERS, IGNORED_IN_NUMBERS),
}


TASKS = {f"{name}_{kind}": (name, kind) for name in SETS for kind in OUTPUT_TYPES}


def metric(name: str, aggregation: str = "mean", **options: Any) -> Json:
    higher = name != "bits_per_byte"
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher} | options


def metrics_of(kind: str, ignored: list[str]) -> list[Json]:
    return {
        "answer": [metric("acc")],
        "text": [metric("bits_per_byte", "bits_per_byte")],
        "generate": [metric("exact_match", regexes_to_ignore=ignored)],
    }[kind]


def expand_tasks(names: list[str]) -> list[str]:
    """gsm8k -> gsm8k_answer, gsm8k_text, gsm8k_generate; each once, in the order given."""
    found: list[str] = []
    for name in names:
        if name not in SETS and name not in TASKS:
            raise UserError(
                f"tasks has {name!r}, known are {', '.join(SETS)} and {', '.join(TASKS)}"
            )
        found += [f"{name}_{kind}" for kind in OUTPUT_TYPES] if name in SETS else [name]
    return list(dict.fromkeys(found))


def split_prompt(prompt: str) -> tuple[str, str]:
    """What stands before an answer, and the space between them: '\\n' of '{question}\\n'.

    lm_eval moves space at the end of a context into the continuation, so that it is scored; here
    it is put there, and its bytes are counted.
    """
    head = prompt.rstrip()
    return head, prompt[len(head) :] or " "


def document(problem: Problem, kind: str, prompt: str, is_example: bool) -> Json:
    """The record that a task's doc_to_text and doc_to_target read."""
    if kind == "text":
        return {"context": "", "target": f"{problem.question}\n{problem.solution}"}
    head, gap = split_prompt(prompt)
    head = head.replace(BARE_PROMPT, problem.question)
    if kind == "answer":
        return {"context": head, "target": gap + problem.answer}
    context = head if gap == " " else head + gap
    return {"context": context, "target": problem.solution if is_example else problem.answer}


def task_config(
    name: str, prompt: str, files: dict[str, str], num_fewshot: int, max_new_tokens: int
) -> Json:
    """A task of lm_eval as its YAML says it."""
    set_name, kind = TASKS[name]
    _, gap = split_prompt(prompt)
    config: Json = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(Path(files["test"]).parent)},
        "test_split": "test",
        "output_type": OUTPUT_TYPES[kind],
        "doc_to_text": "context",
        "doc_to_target": "target",
        "target_delimiter": " " if kind == "generate" and gap == " " else "",
        "num_fewshot": num_fewshot,
        "metric_list": metrics_of(kind, SETS[set_name].ignored),
        "metadata": {"version": 1.0},
    }
    if num_fewshot:
        config |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    if kind == "generate":
        config["filter_list"] = SETS[set_name].filters
        stop = prompt.partition(BARE_PROMPT)[0].strip()  # the model asks itself the next question
        until = [stop] if stop else ["\n\n\n"]
        config["generation_kwargs"] = {
            "until": until,
            "do_sample": False,
            "max_gen_toks": max_new_tokens,
        }
    return config


def write_tasks(
    folder: Path, data: Path, names: list[str], prompt: str, num_fewshot: int, max_new_tokens: int
) -> None:
    """<task>.yaml and its <task>.test.jsonl, <task>.examples.jsonl."""
    for name in names:
        set_name, kind = TASKS[name]
        path = data / SETS[set_name].file
        problems = read_problems(path, SETS[set_name].read)
        if len(problems) <= num_fewshot:
            raise UserError(
                f"{path} has {len(problems)} problems, num_fewshot is {num_fewshot}: none is left"
            )
        splits = {"test": problems[num_fewshot:], "examples": problems[:num_fewshot]}
        files = {split: folder / f"{name}.{split}.jsonl" for split in splits if splits[split]}
        for split, file in files.items():
            is_example = split == "examples"
            documents = [document(one, kind, prompt, is_example) for one in splits[split]]
            file.write_text("".join(json.dumps(one) + "\n" for one in documents))
        paths = {split: str(file.resolve()) for split, file in files.items()}
        config = task_config(name, prompt, paths, num_fewshot, max_new_tokens)
        # JSON is YAML, and has one way to quote a backslash.
        (folder / f"{name}.yaml").write_text(json.dumps(config, indent=2))
