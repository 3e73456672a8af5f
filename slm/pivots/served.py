"""Completions of a model that only a server has: what to ask it next, and what it answered.

    slm pivots served_model=NAME tokenizer=FOLDER problems=p.jsonl requests=ask.jsonl out=pivots
    (send the `body` of every line to /v1/completions, or the file to a batch API)
    slm pivots ... requests=ask.jsonl 'responses=[answers.jsonl]' out=pivots

and so on until nothing is left to ask: the search goes by rounds, about log2 of a completion's
length and two more, and what was answered stays in `out`.

A line of the requests is one place in OpenAI's batch format (slm/score/batch.py): `custom_id` names
it, the prompt is token ids, `n` completions are asked for. Of the body of an answer is read

    choices[i].token_ids                     from return_token_ids=true, as vLLM has it
    choices[i].finish_reason                 stop or length; EOS is added where stop left it out
    choices[i].logprobs.token_logprobs       of whole completions, which are what is cut in two

Text would have to be tokenized again, and need not give the tokens that were drawn: not taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm.errors import UserError
from slm.pivots.measure import Unanswered
from slm.pivots.sampling import Draw, seed_of
from slm.pivots.search import Node
from slm.score.batch import batch_line, body_of, lookup, read_answers, short, write_lines
from slm.store.files import Json, hash_json

ID_CHARACTERS = 12
STANDS_FOR_EOS = 0.0  # log-prob of one that the server left out


def is_cut(phase: str, node: Node) -> bool:
    """The search begins with these completions, which are cut where their log-probs say."""
    return phase == "search" and not node.prefix


class Asked:
    """How a server is asked: what a completion depends on beside its place."""

    def __init__(self, plan: Json, served_model: str, prompts: Mapping[str, list[int]]):
        self.plan, self.served_model, self.prompts = plan, served_model, prompts

    def custom_id(self, phase: str, node: Node) -> str:
        place = hash_json([self.plan, phase, node.question, node.prefix])
        return f"{phase}-{place[:ID_CHARACTERS]}"

    def room(self, node: Node) -> int:
        return self.plan["max_new_tokens"] - len(node.prefix)

    def request(self, phase: str, node: Node) -> Json:
        body = {
            "model": self.served_model,
            "prompt": [*self.prompts[node.question], *node.prefix],
            "max_tokens": self.room(node),
            "n": self.plan[f"{phase}_samples"],
            "temperature": self.plan["temperature"],
            "top_p": self.plan["top_p"],
            "seed": seed_of(self.plan["seed"], phase, [node]) % 2**31,
            "return_token_ids": True,
        }
        whole = {"logprobs": 0} if is_cut(phase, node) else {}
        return batch_line(self.custom_id(phase, node), "/v1/completions", body | whole)


def write_requests(asked: Asked, missing: Unanswered, path: Path) -> Path:
    lines = (asked.request(missing.phase, node) for node in missing.nodes)
    write_lines(path, lines, len(missing.nodes))
    return path


class Served:
    """A sampler that says what a server has said."""

    def __init__(self, asked: Asked, stops: Sequence[int], paths: list[Path]):
        self.asked, self.stops = asked, list(stops)
        self.answers = {one["custom_id"]: (one, where) for one, where in read_answers(paths)}

    def batches(self, nodes: Sequence[Node], samples: int) -> list[list[Node]]:
        return [[node] for node in nodes]

    def sample(self, batch: Sequence[Node], samples: int, phase: str) -> list[list[Draw]]:
        """Nothing where there is no answer yet."""
        return [self.draws(node, samples, phase) for node in batch]

    def draws(self, node: Node, samples: int, phase: str) -> list[Draw]:
        name = self.asked.custom_id(phase, node)
        if name not in self.answers:
            return []
        record, where = self.answers[name]
        choices = lookup("choices", body_of(record, self.asked.served_model, where))
        if not isinstance(choices, list) or len(choices) != samples:
            found = len(choices) if isinstance(choices, list) else short(choices)
            raise UserError(f"{where}: choices has {found} completions, {samples} were asked for")
        return [
            self.draw(
                choice, self.asked.room(node), is_cut(phase, node), f"{where}, choice {number}"
            )
            for number, choice in enumerate(choices)
        ]

    def draw(self, choice: Any, room: int, with_logprobs: bool, where: str) -> Draw:
        table = choice if isinstance(choice, dict) else {}
        ids, reason = lookup("token_ids", table), lookup("finish_reason", table)
        if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
            raise UserError(
                f"{where}: token_ids is {short(ids)}, a list of ids is needed: ask for "
                "return_token_ids=true"
            )
        if reason not in ("stop", "length") or len(ids) > room:
            raise UserError(
                f"{where}: finish_reason is {short(reason)} after {len(ids)} tokens, stop or "
                f"length within {room} is needed"
            )
        left_out = [self.stops[0]] if reason == "stop" and not set(ids[-1:]) & {*self.stops} else []
        ids = [*ids, *left_out][:room]
        if not ids:
            raise UserError(f"{where}: token_ids is [], and nothing was said")
        return Draw(ids, logprobs_of(table, len(ids), where) if with_logprobs else None)

    def logprobs(self, question: str, ids: Sequence[int]) -> list[float]:
        raise AssertionError("whole completions come with theirs")


def logprobs_of(choice: Json, length: int, where: str) -> list[float]:
    """Of each token; an EOS that was left out has none."""
    table = lookup("logprobs", choice)
    values = lookup("token_logprobs", table) if isinstance(table, dict) else None
    if not isinstance(values, list) or not length - 1 <= len(values) <= length:
        raise UserError(
            f"{where}: logprobs.token_logprobs is {short(values)}, {length} numbers are needed: "
            "ask for logprobs=0"
        )
    if not all(type(one) in (int, float) for one in values):
        raise UserError(f"{where}: logprobs.token_logprobs has {short(values)}, not numbers alone")
    return [*map(float, values), *[STANDS_FOR_EOS] * (length - len(values))]
