"""Problem files as tasks of lm_eval: what is asked, what counts as an answer, how it is scored."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slm.errors import UserError
from slm.evaluate.answers import NUMBER, balanced
from slm.evaluate.pairs import read_blimp, read_completion
from slm.evaluate.problems import (
    SETS,
    Problem,
    check_prompt,
    few_shot_prompt,
    find_file,
    read_problems,
)
from slm.store.files import Json

BARE_PROMPT = "{question}"
PROMPT = f"Question: {BARE_PROMPT}\nAnswer:"


# ---- names --------------------------------------------------------------------------------------


class Task(NamedTuple):
    set_name: str
    kind: str


KINDS = ("answer", "text", "generate")  # what the name of a set stands for
TASKS = {f"{name}_{kind}": Task(name, kind) for name in SETS for kind in (*KINDS, "cot")}
TASKS |= {"blimp": Task("blimp", "pairs"), "completion": Task("completion", "pairs")}
GROUPS = {name: [f"{name}_{kind}" for kind in KINDS] for name in SETS}
GROUPS["rho1"] = [f"{name}_cot" for name in SETS]  # Table 1 of the paper


def expand_tasks(names: list[str]) -> list[str]:
    """gsm8k -> gsm8k_answer, gsm8k_text, gsm8k_generate; each once, in the order given."""
    found: list[str] = []
    for name in names:
        if name not in GROUPS and name not in TASKS:
            raise UserError(
                f"tasks has {name!r}, known are {', '.join(GROUPS)} and {', '.join(TASKS)}"
            )
        found += GROUPS[name] if name in GROUPS else [name]
    return list(dict.fromkeys(found))


# ---- scores of lm_eval --------------------------------------------------------------------------


def regex(name: str, pattern: str, which: int) -> Json:
    """lm_eval's filter of that name: match number `which` of the pattern, else [invalid]."""
    find = {"function": "regex", "regex_pattern": pattern, "group_select": which}
    return {"name": name, "filter": [find, {"function": "take_first"}]}


class Strings(NamedTuple):
    """How generated answers are compared as strings."""

    filters: list[Json]
    ignored: list[str]  # removed from both sides before


NUMBERS = [
    regex("strict-match", rf"####\s*({NUMBER})", 0),
    regex("flexible-extract", NUMBER, -1),
]
BOXED = [regex("strict-match", rf"\\boxed\s*\{{({balanced(5)})\}}", -1)]
IN_NUMBERS = [",", r"\$", r"\.0*$"]
# \dfrac and \tfrac are \frac.
IN_LATEX = [r"\\left|\\right|\\[,!;: ]|\\?\$|\s|\.$", r"(?<=\\)[dt](?=frac)"]
# The others' generations are compared as values alone, as is every `cot`.
STRINGS = {
    "gsm8k_generate": Strings(NUMBERS, IN_NUMBERS),
    "math_500_generate": Strings(BOXED, IN_LATEX),
    "svamp_generate": Strings(NUMBERS, IN_NUMBERS),
}


def metric(name: str, aggregation: str = "mean", **options: Any) -> Json:
    higher = name != "bits_per_byte"
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher} | options


def scores(name: str, output_type: str) -> Json:
    """Output type and metrics of a task."""
    metrics = {
        "loglikelihood": [metric("acc")],
        "multiple_choice": [metric("acc")] + [metric("acc_norm")] * (name != "blimp"),
        "loglikelihood_rolling": [metric("bits_per_byte", "bits_per_byte")],
        "generate_until": [],
    }[output_type]
    found: Json = {"output_type": output_type, "metric_list": metrics}
    if output_type == "multiple_choice":
        found["doc_to_choice"] = "choices"
    if name in STRINGS:
        ignored = STRINGS[name].ignored
        found["metric_list"] = [metric("exact_match", regexes_to_ignore=ignored)]
        found["filter_list"] = STRINGS[name].filters
    return found


# ---- documents ----------------------------------------------------------------------------------


def split_prompt(prompt: str) -> tuple[str, str]:
    """What stands before an answer, and the space between them: '\\n' of '{question}\\n'.

    lm_eval moves space at the end of a context into the continuation, so that it is scored; here
    it is put there, and its bytes are counted.
    """
    head = prompt.rstrip()
    return head, prompt[len(head) :] or " "


def document(problem: Problem, kind: str, prompt: str, is_example: bool) -> Json:
    """The record that a task's doc_to_text, doc_to_choice and doc_to_target read."""
    if kind == "text":
        return {"context": "", "target": f"{problem.asked}\n{problem.solution}"}
    head, gap = split_prompt(prompt)
    if kind == "answer":  # the texts of the choices are compared, and not shown
        context = head.replace(BARE_PROMPT, problem.question)
        if not problem.choices:
            return {"context": context, "target": gap + problem.answer}
        choices = [gap + choice for choice in problem.choices]
        return {"context": context, "choices": choices, "target": ord(problem.answer) - ord("A")}
    head = head.replace(BARE_PROMPT, problem.asked)
    target = problem.solution if is_example else problem.answer
    found = {"context": head if gap == " " else head + gap, "target": target}
    return found | {"answer": problem.answer, "choices": list(problem.choices)}


class Asked(NamedTuple):
    """What of `slm harness` says what is asked; see there."""

    problems: Path | None
    files: Mapping[str, str]
    stories: list[Any]
    limit: int | None = None
    num_fewshot: int = 0
    prompt: str = PROMPT
    max_new_tokens: int = 256

    def check_files(self) -> None:
        unknown = [name for name in self.files if name not in (*SETS, "blimp")]
        if unknown:
            raise UserError(f"files has {unknown[0]!r}, known are {', '.join(SETS)} and blimp")

    def path(self, set_name: str) -> Path:
        if set_name in self.files:
            return Path(self.files[set_name])
        if self.problems is None:
            raise UserError(f"problems is null: the folder with the files of {set_name} is needed")
        folder = self.problems
        return folder / "blimp" if set_name == "blimp" else find_file(folder, SETS[set_name])

    def prompt_of(self, task: Task) -> str:
        return few_shot_prompt(SETS[task.set_name].prompt) if task.kind == "cot" else self.prompt

    def shots_of(self, task: Task) -> int:
        """Problems of the file as examples; a `cot` has its own in its prompt."""
        return 0 if task.kind in ("cot", "pairs") else self.num_fewshot


def stop_of(prompt: str) -> str:
    """What begins a question, which the model asks itself next: the last paragraph before it."""
    return prompt.partition(BARE_PROMPT)[0].rpartition("\n\n")[2].strip()


def shots_shown(name: str, from_file: int) -> int:
    """Worked examples before each question of a task."""
    set_name, kind = TASKS[name]
    if kind != "cot":
        return from_file
    prompt = few_shot_prompt(SETS[set_name].prompt)
    return prompt.count(stop_of(prompt)) - 1


def documents(task: Task, asked: Asked) -> dict[str, list[Json]]:
    """test: what is asked; examples: what stands before each."""
    if task.set_name == "completion":
        return {"test": read_completion(asked.stories, asked.limit)}
    path = asked.path(task.set_name)
    if task.set_name == "blimp":
        return {"test": read_blimp(path, asked.limit)}
    if not path.is_file():
        raise UserError(f"{path} is no file: files.{task.set_name} must be one")
    problems, shots = read_problems(path, SETS[task.set_name].read), asked.shots_of(task)
    if len(problems) <= shots:
        raise UserError(
            f"{path} has {len(problems)} problems, num_fewshot is {shots}: none is left"
        )
    prompt, rest = asked.prompt_of(task), problems[shots:][: asked.limit]
    check_prompt(prompt, rest, path)
    return {
        "test": [document(one, task.kind, prompt, False) for one in rest],
        "examples": [document(one, task.kind, prompt, True) for one in problems[:shots]],
    }


# ---- tasks --------------------------------------------------------------------------------------


def output_type(task: Task, one: Json) -> str:
    if task.kind in ("generate", "cot"):
        return "generate_until"
    if task.kind == "text":
        return "loglikelihood_rolling"
    return "multiple_choice" if "choices" in one else "loglikelihood"


def delimiter(task: Task, prompt: str) -> str:
    """What lm_eval puts between the prompt and the solution of an example."""
    return " " if task.kind == "generate" and split_prompt(prompt)[1] == " " else ""


def task_config(name: str, asked: Asked, one: Json, files: dict[str, str]) -> Json:
    """A task of lm_eval as its YAML says it. one: any of its documents"""
    task = TASKS[name]
    prompt = asked.prompt_of(task)
    config: Json = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(Path(files["test"]).parent)},
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_target": "target",
        "target_delimiter": delimiter(task, prompt),
        "num_fewshot": asked.shots_of(task),
        "metadata": {"version": 1.0},
    }
    config |= scores(name, output_type(task, one))
    if "examples" in files:
        config |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    if task.kind in ("generate", "cot"):
        config["generation_kwargs"] = {
            "until": [stop_of(prompt) or "\n\n\n"],
            "do_sample": False,
            "max_gen_toks": asked.max_new_tokens,
        }
    return config


def write_tasks(folder: Path, names: list[str], asked: Asked) -> None:
    """<task>.yaml and its <task>.test.jsonl, <task>.examples.jsonl."""
    asked.check_files()
    for name in names:
        splits = {key: found for key, found in documents(TASKS[name], asked).items() if found}
        paths = {}
        for split, found in splits.items():
            file = folder / f"{name}.{split}.jsonl"
            file.write_text("".join(json.dumps(one) + "\n" for one in found))
            paths[split] = str(file.resolve())
        config = task_config(name, asked, splits["test"][0], paths)
        # JSON is YAML, and has one way to quote a backslash.
        (folder / f"{name}.yaml").write_text(json.dumps(config, indent=2))


def prompts(folder: Path, name: str, asked: Asked) -> list[str]:
    """Of a task that `write_tasks` wrote, as lm_eval puts them together."""
    between = delimiter(TASKS[name], asked.prompt_of(TASKS[name]))
    examples, path = "", folder / f"{name}.examples.jsonl"
    for one in read_lines(path) if path.exists() else []:
        target = one["target"]
        solution = one["choices"][target] if isinstance(target, int) else target
        examples += f"{one['context']}{between}{solution}\n\n"
    return [examples + one["context"] for one in read_lines(folder / f"{name}.test.jsonl")]


def read_lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]
