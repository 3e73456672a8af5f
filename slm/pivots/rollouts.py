"""Completions on disk: a line of rollouts.jsonl for each place and phase.

    {"phase": "search", "question": "8f02...", "prefix": [12, 9], "samples": [[4, 1], ...],
     "right": [1, ...], "logprobs": [[-0.1, -0.2], ...]}

`question` is the key of questions.py. Lines are appended and synced, a batch at a time; what a
killed process left of its last line is cut off. In memory is only how the completions of each place
begin, and how many of them are right; they are read again where they lie. Log-probs are there where
a server gave them.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from slm.errors import UserError
from slm.pivots.search import Node
from slm.store.files import Json, naming

NAME = "rollouts.jsonl"
FIELDS = {"phase", "question", "prefix", "samples", "right"}


class Tally(NamedTuple):
    """Of so many completions so many are right."""

    right: int
    samples: int


class Sample(NamedTuple):
    """New ids behind a prefix, with the EOS where one ended them."""

    ids: list[int]
    right: bool
    logprobs: list[float] | None = None


class Place(NamedTuple):
    """What is known of the completions of a node in a phase."""

    firsts: dict[int, Tally]  # by their first token
    offset: int  # of the line

    @property
    def tally(self) -> Tally:
        found = self.firsts.values()
        return Tally(sum(one.right for one in found), sum(one.samples for one in found))


class Rollouts:
    """The file of a folder, which one process adds to."""

    def __init__(self, folder: Path, stops: Sequence[int]):
        self.path, self.stops = folder / NAME, set(stops)
        self.places: dict[tuple[str, Node], Place] = {}
        self.num_samples = self.num_tokens = self.num_ended = 0
        self.end = 0  # of the whole lines
        with naming(self.path), open(self.path, "a+b") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # a process was killed as it wrote this
                self.take(parse(line, f"{self.path} line {number}"), len(line))
            file.truncate(self.end)

    def take(self, record: Json, size: int) -> None:
        key = record["phase"], Node(record["question"], tuple(record["prefix"]))
        firsts: dict[int, list[int]] = {}
        for ids, right in zip(record["samples"], record["right"], strict=True):
            found = firsts.setdefault(ids[0], [0, 0])
            found[0] += right
            found[1] += 1
        tallies = {token: Tally(*found) for token, found in firsts.items()}
        self.places[key] = Place(tallies, self.end)
        self.end += size
        self.num_samples += len(record["samples"])
        self.num_tokens += sum(map(len, record["samples"]))
        self.num_ended += sum(ids[-1] in self.stops for ids in record["samples"])

    def add(self, phase: str, found: Iterable[tuple[Node, Sequence[Sample]]]) -> None:
        records = [record_of(phase, node, samples) for node, samples in found]
        lines = [json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in records]
        with naming(self.path), open(self.path, "ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        for record, line in zip(records, lines, strict=True):
            self.take(record, len(line))

    def samples(self, phase: str, node: Node) -> list[Sample]:
        """As they were drawn."""
        with open(self.path, "rb") as file:
            file.seek(self.places[phase, node].offset)
            record = json.loads(file.readline())
        logprobs = record["logprobs"] if "logprobs" in record else [None] * len(record["right"])
        rows = zip(record["samples"], record["right"], logprobs, strict=True)
        return [Sample(ids, bool(right), values) for ids, right, values in rows]

    def firsts(self, node: Node, phases: Sequence[str]) -> dict[int, Tally]:
        """How the completions of a place begin, and how many are right."""
        total: dict[int, Tally] = {}
        for phase in phases:
            for token, one in self.places[phase, node].firsts.items():
                before = total[token] if token in total else Tally(0, 0)
                total[token] = Tally(before.right + one.right, before.samples + one.samples)
        return total


def record_of(phase: str, node: Node, samples: Sequence[Sample]) -> Json:
    record = {
        "phase": phase,
        "question": node.question,
        "prefix": list(node.prefix),
        "samples": [one.ids for one in samples],
        "right": [int(one.right) for one in samples],
    }
    known = all(one.logprobs is not None for one in samples)
    return record | ({"logprobs": [one.logprobs for one in samples]} if known else {})


def parse(line: bytes, where: str) -> Json:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from None
    if not isinstance(record, dict) or not record.keys() >= FIELDS:
        raise UserError(f"{where} is no line of rollouts: it must have {', '.join(sorted(FIELDS))}")
    if len(record["samples"]) != len(record["right"]) or not all(record["samples"]):
        raise UserError(
            f"{where} has {len(record['samples'])} samples, {len(record['right'])} right"
        )
    return record
