"""Models through lm_eval, the EleutherAI harness, on local files and without a network.

    slm harness 'models={base: runs/base/model, slm: runs/slm/model}' problems=eval out=table.csv

Every set of problems becomes JSON lines and one YAML for each of its tasks in a temporary folder,
which lm_eval reads as it reads its own tasks. Its `hf` model loads the model folder as any user of
lm_eval would. What a task measures:

    <set>_answer    loglikelihood of the final answer after the prompt (`prompt`, no solution):
                    acc            the answer is what greedy decoding gives
                    nats           mean of -log p(answer), nats an answer
                    bits_per_byte  nats summed / (ln 2 * UTF-8 bytes of the answers and their space)
    <set>_text      loglikelihood_rolling of question, newline, solution after one special token:
                    bits_per_byte  as above, over the whole texts, in windows of the model's length
    <set>_generate  generate_until, greedy: exact_match of what a filter finds in the text:
                    strict-match      the number after ####, or the last \\boxed{} (MATH)
                    flexible-extract  the last number (none for MATH)

A folder that slm wrote is asked as it was trained: texts follow an EOS, and no other special token
stands before a text or a prompt. A model from elsewhere is asked as its tokenizer begins a text,
after a BOS where that adds one. No special token is ever scored.

exact_match compares strings, of which commas in numbers, dollar signs, .00 and a few LaTeX
spellings are removed first; an equal answer written otherwise counts as wrong. The stderr of means
is lm_eval's; that of bits per byte, where it gives none, is of a ratio of sums, to first order.
Costs three passes over the problems; by far the longest is the generation.
"""

import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from slm.command_keys import HARNESS
from slm.console import LINE_EVERY_S
from slm.errors import UserError
from slm.evaluate.tasks import BARE_PROMPT, SETS, TASKS, expand_tasks, write_tasks
from slm.stage import Folder, stage
from slm.store.files import Json, write_csv

log = logging.getLogger("slm.harness")

Row = dict[str, Any]

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
VERSIONED = ("lm_eval", "transformers", "torch")


# ---- rows ---------------------------------------------------------------------------------------


class Value(NamedTuple):
    metric: str
    filter: str
    value: float
    stderr: float | None


def ratio(above: list[float], below: list[float]) -> tuple[float, float | None]:
    """sum(above) / sum(below) and its standard error, to first order (None for one problem)."""
    n, value = len(above), sum(above) / sum(below)
    if n == 1:
        return value, None
    squares = sum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
    return value, math.sqrt(n / (n - 1) * squares) / sum(below)


def reported_values(result: Json) -> Iterator[Value]:
    """What lm_eval says of one task: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}."""
    for key, value in result.items():
        name, _, filter_name = key.partition(",")
        if filter_name and not name.endswith("_stderr"):
            stderr = result[f"{name}_stderr,{filter_name}"]
            yield Value(name, filter_name, value, stderr if isinstance(stderr, float) else None)


def loglikelihood_values(samples: list[Json], kind: str) -> Iterator[Value]:
    """nats an answer and bits per byte of lm_eval's log-likelihoods of one task."""
    found = [sample["filtered_resps"][0] for sample in samples]
    nats = [-float(one[0] if kind == "answer" else one) for one in found]
    num_bytes = [float(len(sample["doc"]["target"].encode())) for sample in samples]
    if kind == "answer":
        yield Value("nats", "none", *ratio(nats, [1.0] * len(nats)))
    bits = [one / math.log(2) for one in nats]
    yield Value("bits_per_byte", "none", *ratio(bits, num_bytes))


def task_rows(name: str, results: Json) -> list[Row]:
    """A row a metric; bits per byte by our sums, which have a standard error."""
    values = list(reported_values(results["results"][name]))
    _, kind = TASKS[name]
    if kind in ("answer", "text"):
        values = [one for one in values if one.metric != "bits_per_byte"]
        values += loglikelihood_values(results["samples"][name], kind)
    shared = {"n": results["n-samples"][name]["effective"], "num_fewshot": results["n-shot"][name]}
    return [{"task": name} | one._asdict() | shared for one in values]


# ---- lm_eval ------------------------------------------------------------------------------------


def go_offline() -> None:
    """Before the first import of datasets and huggingface_hub, which read it once."""
    os.environ.update(OFFLINE)
    if not sys.stderr.isatty():  # tqdm: a line every so often for logs that nobody watches live
        os.environ.setdefault("TQDM_MININTERVAL", str(LINE_EVERY_S))


def check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise UserError("lm_eval is not installed: pip install 'slm-trainer[lm-eval]'")


def is_ours(folder: str) -> bool:
    return (Path(folder) / "slm.json").exists()


def check_room(folder: str, max_new_tokens: int) -> None:
    """lm_eval gives the prompt what max_new_tokens leaves of the model's positions."""
    from transformers import AutoConfig

    from slm.model.architecture import position_limit
    from slm.store.tokenizer import first_line
    from slm.store.trust import check_no_code

    check_no_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model {folder} has a damaged config.json: {first_line(error)}") from None
    limit = position_limit(config)
    if limit is not None and max_new_tokens >= limit:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, it must be less than the "
            f"{limit} max_position_embeddings of {folder}"
        )


def special_tokens(folder: str, tokenizer: Any) -> Json:
    """What lm_eval puts before the texts of a model."""
    if is_ours(folder):  # in a corpus an EOS ends each document, and nothing begins one
        return {"add_bos_token": False, "prefix_token_id": tokenizer.eos_token_id}
    bare = tokenizer.encode("a", add_special_tokens=False)
    return {"add_bos_token": tokenizer.encode("a") == [tokenizer.bos_token_id, *bare]}


def load_lm(folder: str, batch_size: int, device: str) -> Any:
    """lm_eval's own `hf` model of a folder."""
    from lm_eval.models import huggingface

    from slm.model.folder import quiet_without_terminal
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
        return make(pretrained=folder, tokenizer=tokenizer, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"lm_eval cannot load {folder}: {first_line(error)}") from None


def run_tasks(lm: Any, folder: Path, names: list[str], limit: int | None) -> list[Row]:
    """`lm` (an lm_eval LM) on the tasks that `write_tasks` wrote into `folder`."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    evaluate: Any = lm_eval.simple_evaluate
    results = evaluate(lm, tasks=names, task_manager=manager, limit=limit)
    return [row for name in names for row in task_rows(name, results)]


@stage(HARNESS)
def harness(
    models: Mapping[str, Folder],
    problems: Folder,
    *,
    tasks: Sequence[str] = tuple(SETS),
    limit: int | None = None,
    num_fewshot: int = 0,
    prompt: str = f"Question: {BARE_PROMPT}\nAnswer:",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    device: str = "auto",
    modules: Sequence[str] = (),
    out: Folder | None = None,
) -> list[Row]:
    """Accuracy and bits per byte of models by lm_eval, offline, on local files.

    Args:
        models: name -> model folder.
        problems: folder with gsm8k_test.jsonl, math_500.jsonl, svamp.jsonl.
        tasks: sets, or single tasks of them such as "svamp_answer".
        limit: at most the first so many problems of each set.
        num_fewshot: worked examples before each question.
        prompt: what stands before an answer, with {question} in it.
        batch_size: requests per forward.
        max_new_tokens: of a generated answer.
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.
        out: a CSV file for the rows.

    Returns:
        A row for every model, task and metric, with the versions that made it.

    Raises:
        UserError: lm_eval is not installed, a folder or a file is damaged, a setting is wrong.
    """
    check_installed()
    go_offline()
    from slm.model.build import load_model
    from slm.model.device import pick_device
    from slm.model.folder import verify_weights
    from slm.selection.registry import import_modules
    from slm.store.hub import check_model_folder

    where = str(pick_device(device))
    import_modules(modules)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    names = expand_tasks(list(tasks))
    folders = {name: str(folder) for name, folder in models.items()}
    for folder in folders.values():  # all of them before the first forward
        check_model_folder("model", folder)
        verify_weights(Path(folder), lambda count: None)
        if not is_ours(folder):  # no hashes: lm_eval makes up what is missing
            load_model(folder)
        check_room(folder, max_new_tokens)
    versions = {name: version(name) for name in VERSIONED}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="slm-harness-") as temporary:
        written = Path(temporary)
        write_tasks(written, Path(problems), names, prompt, num_fewshot, max_new_tokens)
        for number, (name, folder) in enumerate(folders.items(), 1):
            log.info(f"model {number} of {len(models)}: {name}, {len(names)} tasks")
            lm = load_lm(folder, batch_size, where)
            found = run_tasks(lm, written, names, limit)
            rows += [{"model": name} | row | versions for row in found]
    if out is not None:
        write_csv(Path(out), rows)
    return rows


# ---- the command --------------------------------------------------------------------------------


def cell(row: Row) -> str:
    return f"{row['value']:.4f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")


def print_table(rows: list[Row]) -> None:
    """A line for each task and metric, a column for each model."""
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
    if settings["out"] is not None:
        log.info(f"table: {settings['out']}")
