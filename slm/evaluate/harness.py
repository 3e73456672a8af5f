"""Models through lm_eval, the EleutherAI harness, on local files and without a network.

    slm harness 'models={base: runs/base/model, slm: runs/slm/model}' problems=eval out=table.csv

Every set of problems becomes JSON lines and one YAML for each of its tasks in a temporary folder,
which lm_eval reads as it reads its own tasks. Its `hf` model loads the model folder as any user of
lm_eval would. What a task measures:

    <set>_answer    loglikelihood of the final answer after the prompt (`prompt`, no solution):
                    acc            the answer is what greedy decoding gives
                    nats           mean of -log p(answer), nats an answer
                    bits_per_byte  nats summed / (ln 2 * UTF-8 bytes of the answers and their space)
                    of a set with choices, which the prompt then does not show: acc, acc_norm, the
                    right one is the likeliest, in all or for its length; the others are of it
    <set>_text      loglikelihood_rolling of question, newline, solution after one special token:
                    bits_per_byte  as above, over the whole texts, in windows of the model's length
    <set>_generate  generate_until, greedy after `prompt`:
                    exact_match    of what a filter finds in the text (GSM8K, MATH-500, SVAMP):
                    strict-match      the number after ####, or the last \\boxed{} (MATH)
                    flexible-extract  the last number (none for MATH)
                    value_match    the answer that slm.evaluate.answers finds has the right value
    <set>_cot       the same value_match after worked examples of prompts/, as in the paper's table
    blimp           acc: the good sentence is the likelier; by phenomenon and paradigm too
    completion      acc, acc_norm: the story's own ending is the likeliest of four

A folder that slm wrote is asked as it was trained: texts follow an EOS, and no other special token
stands before a text or a prompt. A model from elsewhere is asked as its tokenizer begins a text,
after a BOS where that adds one. No special token is ever scored.

exact_match compares strings, of which commas in numbers, dollar signs, .00 and a few LaTeX
spellings are removed first; an equal answer written otherwise counts as wrong there, and is right
by value_match. The stderr of means is lm_eval's; where it gives none, it is of a ratio of sums, to
first order.
Costs three passes over the problems; by far the longest is the generation.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from slm.command_keys import HARNESS
from slm.console import LINE_EVERY_S
from slm.errors import UserError
from slm.evaluate.rows import Row, completions, task_rows
from slm.evaluate.tasks import PROMPT, TASKS, Asked, expand_tasks, prompts, shots_shown, write_tasks
from slm.stage import Folder, stage
from slm.store.files import Json, atomic_file, write_csv

log = logging.getLogger("slm.harness")

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
VERSIONED = ("lm_eval", "transformers", "torch")


# ---- lm_eval ------------------------------------------------------------------------------------


def go_offline() -> None:
    """Before the first import of datasets and huggingface_hub, which read it once."""
    os.environ.update(OFFLINE)
    if not sys.stderr.isatty():  # tqdm: a line every so often for logs that nobody watches live
        os.environ.setdefault("TQDM_MININTERVAL", str(LINE_EVERY_S))


def check_installed() -> None:
    for name in ("lm_eval", "math_verify"):
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'slm-trainer[lm-eval]'")


def is_ours(folder: str) -> bool:
    return (Path(folder) / "slm.json").exists()


def positions(folder: str) -> int | None:
    """Of the model; None where it has no limit."""
    from transformers import AutoConfig

    from slm.model.architecture import position_limit
    from slm.store.hub import place
    from slm.store.tokenizer import first_line
    from slm.store.trust import check_no_code

    check_no_code(folder)
    try:
        config = AutoConfig.from_pretrained(**place(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model {folder} has a damaged config.json: {first_line(error)}") from None
    return position_limit(config)


def is_generated(name: str) -> bool:
    return TASKS[name].kind in ("generate", "cot")


def check_room(folder: str, names: Sequence[str], max_new_tokens: int) -> None:
    """Where a task generates, lm_eval gives prompts what max_new_tokens leaves of the positions."""
    limit = positions(folder) if any(map(is_generated, names)) else None
    if limit is not None and max_new_tokens >= limit:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, it must be less than the "
            f"{limit} max_position_embeddings of {folder}"
        )


def check_prompts(written: Path, folder: str, names: Sequence[str], asked: Asked) -> list[str]:
    """lm_eval cuts a prompt that is too long at its beginning, where the worked examples stand.

    Returns:
        A sentence for each task of which that happens to some prompts; UserError where to all.
    """
    from slm.store.tokenizer import load_tokenizer

    limit, tokenizer, said = positions(folder), load_tokenizer(folder), []
    adds = special_tokens(folder, tokenizer)["add_bos_token"]
    if limit is None:
        return []
    for name in names:
        if TASKS[name].kind not in ("answer", "generate", "cot"):
            continue
        new = asked.max_new_tokens if is_generated(name) else 0
        asks = prompts(written, name, asked)
        ids = tokenizer(asks, add_special_tokens=adds, verbose=False)["input_ids"]
        lengths = sorted(map(len, ids))
        cut = sum(length > limit - new for length in lengths)
        room = f"the {limit - new:,} positions that max_new_tokens={new} leaves of {limit:,}"
        room = room if new else f"the {limit:,} positions"
        if cut == len(lengths):
            raise UserError(
                f"{name}: each prompt has {lengths[0]:,} tokens or more, over {room} in {folder}: "
                + advice(name, asked.num_fewshot)
            )
        if cut:
            said.append(
                f"{name}: {cut:,} of {len(lengths):,} prompts, the longest of {lengths[-1]:,} "
                f"tokens, were cut at their beginning to {room} in {folder}"
            )
    return said


def advice(name: str, num_fewshot: int) -> str:
    if TASKS[name].kind == "cot":
        less = f"its {shots_shown(name, 0)} worked examples are fixed, ask"
        return f"{less} {TASKS[name].set_name}_generate with num_fewshot=0, or a longer model"
    fewer = "num_fewshot=0" if num_fewshot else "a shorter `prompt`"
    return f"set {fewer}, or ask a longer model"


def special_tokens(folder: str, tokenizer: Any) -> Json:
    """What lm_eval puts before the texts of a model."""
    if is_ours(folder):  # in a corpus an EOS ends each document, and nothing begins one
        return {"add_bos_token": False, "prefix_token_id": tokenizer.eos_token_id}
    bare = tokenizer.encode("a", add_special_tokens=False)
    return {"add_bos_token": tokenizer.encode("a") == [tokenizer.bos_token_id, *bare]}


def load_lm(folder: str, batch_size: int, device: str) -> Any:
    """lm_eval's own `hf` model of a folder; of a GGUF the weights as floats, as we load it."""
    from lm_eval.models import huggingface

    from slm.model.build import load_model
    from slm.model.folder import quiet_without_terminal
    from slm.store.hub import gguf_file
    from slm.store.tokenizer import first_line, load_tokenizer

    hf = cast(Any, huggingface.HFLM)

    class Model(hf):
        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """The prefix token stands before a text already; a BOS of the text would be scored."""
            adds, self.add_bos_token = self.add_bos_token, False
            found = super().loglikelihood_rolling(requests, disable_tqdm)
            self.add_bos_token = adds
            return found

    quiet_without_terminal()
    make: Any = Model
    tokenizer = load_tokenizer(folder)
    options = special_tokens(folder, tokenizer) | {"batch_size": batch_size, "device": device}
    try:
        floats: Any = None if gguf_file(folder) is None else load_model(folder)
        given = folder if floats is None else floats.to(device)
        return make(pretrained=given, tokenizer=tokenizer, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"lm_eval cannot load {folder}: {first_line(error)}") from None


class Found(NamedTuple):
    rows: list[Row]
    completions: list[Row]  # of every problem of a task that generates


def run_tasks(lm: Any, folder: Path, names: list[str]) -> Found:
    """`lm` (an lm_eval LM) on the tasks that `write_tasks` wrote into `folder`."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    evaluate: Any = lm_eval.simple_evaluate
    results = evaluate(lm, tasks=names, task_manager=manager)
    found = Found([], [])
    for name in names:
        said = completions(results["samples"][name]) if is_generated(name) else []
        found.completions.extend({"task": name} | one for one in said)
        found.rows.extend(task_rows(name, results, [one["value_match"] for one in said]))
    return found


@stage(HARNESS)
def harness(
    models: Mapping[str, Folder],
    problems: Folder | None = None,
    *,
    files: Mapping[str, Folder] | None = None,
    stories: Sequence[Any] = (),
    tasks: Sequence[str] = ("gsm8k", "math_500", "svamp"),
    limit: int | None = None,
    num_fewshot: int = 0,
    prompt: str = PROMPT,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    device: str = "auto",
    modules: Sequence[str] = (),
    out: Folder | None = None,
    samples: Folder | None = None,
) -> list[Row]:
    """Accuracy and bits per byte of models by lm_eval, offline, on local files.

    Args:
        models: name -> model folder.
        problems: folder with gsm8k_test.jsonl, math_500.jsonl, svamp.jsonl and the like, or `data`
            of math-evaluation-harness.
        files: set -> its file where it lies elsewhere; "blimp" -> the folder of its files.
        stories: sources as of `slm prepare`, for the task "completion".
        tasks: sets, single tasks of them such as "svamp_answer", "blimp", "completion", or "rho1":
            the nine sets of the paper's Table 1 after worked examples.
        limit: at most the first so many problems of each set, pairs of each file of BLiMP.
        num_fewshot: the file's first problems, with solutions, before each question.
        prompt: what stands before an answer, with {question} in it.
        batch_size: requests per forward.
        max_new_tokens: of a generated answer.
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.
        out: a CSV file for the rows.
        samples: a JSONL file for completions and the answers found in them.

    Returns:
        A row for every model, task and metric, with the versions that made it.

    Raises:
        UserError: lm_eval is not installed, a folder or a file is damaged, a setting is wrong,
            a prompt holds a problem that is asked, or every prompt of a task is longer than the
            model. Where some are, lm_eval cuts their beginning, and a warning says how many.
    """
    check_installed()
    go_offline()
    from slm.model.build import load_model
    from slm.model.device import pick_device
    from slm.model.folder import verify_weights
    from slm.selection.registry import import_modules
    from slm.store.hub import check_model_folder, gguf_file

    where = str(pick_device(device))
    import_modules(modules)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    names = expand_tasks(list(tasks))
    folders = {name: str(folder) for name, folder in models.items()}
    for folder in folders.values():  # all of them before the first forward
        check_model_folder("model", folder)
        if gguf_file(folder) is None:
            verify_weights(Path(folder), lambda count: None)
        if not is_ours(folder):  # no hashes: lm_eval makes up what is missing
            load_model(folder)
        check_room(folder, names, max_new_tokens)
    asked = Asked(
        None if problems is None else Path(problems),
        {name: str(path) for name, path in (files or {}).items()},
        list(stories),
        limit,
        num_fewshot,
        prompt,
        max_new_tokens,
    )
    rows, said = run_models(folders, names, asked, batch_size, where)
    if out is not None:
        write_csv(Path(out), rows)
    if samples is not None:
        write_lines(Path(samples), said)
    return rows


def run_models(
    folders: Mapping[str, str], names: list[str], asked: Asked, batch_size: int, device: str
) -> Found:
    versions, every = {name: version(name) for name in VERSIONED}, Found([], [])
    with tempfile.TemporaryDirectory(prefix="slm-harness-") as temporary:
        written = Path(temporary)
        write_tasks(written, names, asked)
        cut = [check_prompts(written, folder, names, asked) for folder in folders.values()]
        for number, (name, folder) in enumerate(folders.items(), 1):
            log.info(f"model {number} of {len(folders)}: {name}, {len(names)} tasks")
            found = run_tasks(load_lm(folder, batch_size, device), written, names)
            every.rows.extend({"model": name} | row | versions for row in found.rows)
            every.completions.extend({"model": name} | one for one in found.completions)
    for sentence in chain.from_iterable(cut):  # at the end, where lm_eval's bars do not bury it
        log.warning(sentence)
    return every


def write_lines(path: Path, rows: list[Row]) -> None:
    with atomic_file(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


# ---- the command --------------------------------------------------------------------------------


def cell(row: Row) -> str:
    return f"{row['value']:.4f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")


def print_table(rows: list[Row]) -> None:
    """A line for each task and metric, a column for each model; paradigms are in the file alone."""
    rows = [row for row in rows if row["task"].count("/") < 2]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        filtered = "" if row["filter"] == "none" else f"\n{row['filter']}"
        key = (row["task"], row["metric"] + filtered, f"{row['n']:,}")
        lines.setdefault(key, {})[row["model"]] = cell(row)
    table = Table(Column("task", no_wrap=True), "metric", "n", *map(escape, models))
    for key, cells in lines.items():
        table.add_row(*key, *[cells[model] for model in models])
    Console().print(table)


def run(**settings: Any) -> None:
    print_table(harness(**settings))
    for name, key in (("table", "out"), ("completions", "samples")):
        if settings[key] is not None:
            log.info(f"{name}: {settings[key]}")
