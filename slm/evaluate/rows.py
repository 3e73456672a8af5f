"""What lm_eval's results and samples say of a task: its rows, and its completions one by one."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from slm.evaluate.answers import extract, is_right
from slm.evaluate.tasks import TASKS, shots_shown
from slm.store.files import Json

Row = dict[str, Any]


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


def mean(values: list[float]) -> tuple[float, float | None]:
    return ratio(values, [1.0] * len(values))


def target_of(sample: Json) -> tuple[float, str]:
    """Nats of the right text of a sample, and the text."""
    doc, found = sample["doc"], sample["filtered_resps"]
    right = doc["target"] if "choices" in doc else 0
    nats = found[right][0] if isinstance(found[right], tuple | list) else found[right]
    return -float(nats), doc["choices"][right] if "choices" in doc else doc["target"]


def loglikelihood_values(samples: list[Json], kind: str) -> Iterator[Value]:
    """nats an answer and bits per byte of lm_eval's log-likelihoods of one task."""
    nats, texts = zip(*map(target_of, samples), strict=True)
    if kind != "text":
        yield Value("nats", "none", *mean(list(nats)))
    bits = [one / math.log(2) for one in nats]
    yield Value("bits_per_byte", "none", *ratio(bits, [float(len(t.encode())) for t in texts]))


def completion_of(sample: Json) -> Row:
    """A generated text, the answer that was found in it, and whether it has the right value."""
    doc, text = sample["doc"], sample["resps"][0][0]
    found = extract(text, len(doc["choices"]))
    right = is_right(found, doc["answer"], doc["choices"])
    row = {"problem": sample["doc_id"], "prompt": sample["arguments"][0][0], "completion": text}
    return row | {"extracted": found, "answer": doc["answer"], "value_match": float(right)}


def completions(samples: list[Json]) -> list[Row]:
    """Of a task that generates; lm_eval has a sample for every filter."""
    by_problem = {sample["doc_id"]: sample for sample in samples}
    return [completion_of(by_problem[number]) for number in sorted(by_problem)]


def group_rows(name: str, samples: list[Json]) -> list[Row]:
    """Accuracy of each phenomenon and paradigm of BLiMP: blimp/binding, blimp/binding/..."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        phenomenon, paradigm = sample["doc"]["group"].split("/")
        for group in (f"{name}/{phenomenon}", f"{name}/{phenomenon}/{paradigm}"):
            found.setdefault(group, []).append(sample["acc"])
    rows = {group: Value("acc", "none", *mean(accs))._asdict() for group, accs in found.items()}
    return [
        {"task": group} | row | {"n": len(found[group]), "num_fewshot": 0}
        for group, row in rows.items()
    ]


def task_rows(name: str, results: Json, rights: list[float]) -> list[Row]:
    """A row a metric; bits per byte by our sums, which have a standard error.

    rights: of each completion whether it has the right value; none where nothing is generated
    """
    kind, samples = TASKS[name].kind, results["samples"][name]
    values = list(reported_values(results["results"][name]))
    if rights:
        values.append(Value("value_match", "none", *mean(rights)))
    else:
        values = [one for one in values if one.metric != "bits_per_byte"]
        values += loglikelihood_values(samples, kind)
    shots = shots_shown(name, results["n-shot"][name])
    shared = {"n": len({sample["doc_id"] for sample in samples}), "num_fewshot": shots}
    rows = [{"task": name} | one._asdict() | shared for one in values]
    return rows + (group_rows(name, samples) if name == "blimp" else [])
