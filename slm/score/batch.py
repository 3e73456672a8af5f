"""OpenAI's batch format: the lines of requests to a server, and those of its answers.

A line of the requests is {"custom_id", "method": "POST", "url", "body"}. A line of the answers has
that `custom_id`, in any order, and is either the batch output ({"custom_id", "response":
{"status_code", "body"}, "error"}) or the body with a `custom_id` beside its fields. What is asked
and what is read of a body is the caller's: log-probs in served.py, labels in slm/quality.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from slm.console import progress
from slm.errors import UserError
from slm.store.files import Json, atomic_file


def batch_line(custom_id: str, url: str, body: Json) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write_lines(path: Path, lines: Iterable[Json], total: int) -> None:
    """The same bytes again if it is run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, progress("writing", total, "requests") as advance:
        for line in lines:
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            advance(1)


def response_files(given: Any) -> list[Path]:
    paths = [Path(given)] if isinstance(given, str) else [Path(path) for path in given]
    for path in paths:
        if not path.is_file():
            raise UserError(f"responses: {path} is no file")
    return paths


def read_answers(paths: list[Path]) -> Iterator[tuple[Json, str]]:
    """(record, where it stands) of every line that is not blank; each has a custom_id."""
    total = sum(path.stat().st_size for path in paths)
    with progress("reading", total, "bytes") as advance:
        for path in paths:
            yield from read_file(path, advance)


def read_file(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[Json, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path} line {number}"
                yield parse(line, where), where
            advance(len(line))


def lookup(name: str, *tables: Json) -> Any:
    """The first value of that name that is there and not null."""
    found = [table[name] for table in tables if name in table and table[name] is not None]
    return found[0] if found else None


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."


def parse(line: bytes, where: str) -> Json:
    try:
        record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{where} is not valid JSON, cut off perhaps ({error})") from None
    if not isinstance(record, dict) or not isinstance(lookup("custom_id", record), str):
        raise UserError(f"{where} has no custom_id, which the line of its request has")
    return record


def body_of(record: Json, served_model: str, where: str) -> Json:
    """The completion in a line, be it wrapped as batch output or not, of that model."""
    response = record["response"] if "response" in record else {"body": record}
    tables = [table for table in (record, response) if isinstance(table, dict)]
    body = lookup("body", *tables[1:])
    tables += [body] if isinstance(body, dict) else []
    if (error := lookup("error", *tables)) is not None:
        raise UserError(f"{where}: the server answered with an error: {short(error)}")
    status = lookup("status_code", *tables[1:])
    if status not in (None, 200):
        raise UserError(f"{where}: the server answered with status_code {status}: {short(body)}")
    if not isinstance(body, dict):
        raise UserError(f"{where}: response.body is {short(body)}, it must be a completion")
    model = lookup("model", body)
    if model not in (None, served_model):
        raise UserError(f"{where}: model is {model!r}, served_model is {served_model!r}")
    return body


def choice_of(body: Json, where: str) -> Json:
    """The one choice of a completion; what is no completion speaks for itself."""
    if "choices" not in body:
        return body
    choices = body["choices"]
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UserError(f"{where}: choices is {short(choices)}, one is needed")
    return choices[0]
