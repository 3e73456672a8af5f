"""A server's completions, round by round; here the server is a model of our own."""

import json
from pathlib import Path
from typing import Any

import pytest

from pivot_helpers import save_chain, write_problems
from slm.errors import UserError
from slm.evaluate.generation import Sampling
from slm.pivots.command import Pivots, pivots
from slm.pivots.sampling import OwnModel
from slm.pivots.search import Node

HOW: dict[str, Any] = {"p_gap": 0.3, "search_gap": 0.25, "max_new_tokens": 8, "solutions": 4}
HOW |= {"served_model": "chain"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory, bytes_folder) -> str:
    folder = tmp_path_factory.mktemp("chain") / "model"
    save_chain(folder, bytes_folder)
    return str(folder)


class Server:
    """What vLLM would answer; it leaves the EOS out of token_ids where `bare`."""

    def __init__(self, chain: str, bare: bool):
        self.chain, self.bare, self.bodies = chain, bare, []

    def answer(self, requests: Path, to: Path) -> str:
        lines = [json.loads(line) for line in requests.read_text().splitlines()]
        to.write_text("".join(json.dumps(self.line(one)) + "\n" for one in reversed(lines)))
        return str(to)

    def line(self, request: dict[str, Any]) -> dict[str, Any]:
        body = request["body"]
        self.bodies.append(body)
        how = Sampling(body["max_tokens"], body["temperature"], body["top_p"])
        rest: dict[str, Any] = {"batch_size": 64, "dtype": "float32", "device": "cpu"}
        model = OwnModel(self.chain, 0, {"": body["prompt"]}, how, seed=body["seed"], **rest)
        (draws,) = model.sample([Node("", ())], body["n"], "")
        choices = [self.choice(model, one.ids, body) for one in draws]
        response = {"status_code": 200, "body": {"model": body["model"], "choices": choices}}
        return {"custom_id": request["custom_id"], "response": response, "error": None}

    def choice(self, model: OwnModel, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        ended = ids[-1] == 0
        kept = ids[:-1] if self.bare and ended else ids
        found: dict[str, Any] = {"token_ids": kept, "finish_reason": "stop" if ended else "length"}
        if "logprobs" in body:
            found["logprobs"] = {"token_logprobs": model.logprobs("", ids)[: len(kept)]}
        return found


@pytest.mark.parametrize("bare", [False, True])
def test_rounds_of_requests_and_answers_end_in_pivots(tmp_path, chain, bytes_folder, bare):
    problems = write_problems(tmp_path / "p.jsonl", {"question": "say:", "answer": "1"})
    server, out, ask = Server(chain, bare), tmp_path / "out", tmp_path / "ask.jsonl"
    given: dict[str, Any] = {"tokenizer": bytes_folder, "requests": ask, **HOW}
    made, rounds = pivots(problems, out, **given), 0
    while isinstance(made, Path):
        assert made == ask and rounds < 8
        responses = server.answer(ask, tmp_path / f"answers-{rounds}.jsonl")
        rounds += 1
        made = pivots(problems, out, responses=responses, **given)  # the last ones alone
    assert isinstance(made, Pivots) and rounds > 2
    found = {(row["prefix"], row["token"]) for row in made.pivots}
    assert found == {("ab", "c"), ("ab", "d"), ("abc", "2"), ("abd", "1")}
    root, *others = server.bodies
    assert root["prompt"] == made.pivots[0]["prompt_ids"] and root["logprobs"] == 0
    assert (root["n"], root["max_tokens"], root["model"]) == (32, 8, "chain")
    assert all("logprobs" not in body for body in others)
    assert {body["n"] for body in others} == {32, 64}
    assert {len(b["prompt"]) - len(root["prompt"]) + b["max_tokens"] for b in others} == {8}
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies)
    again = pivots(problems, out, **given)
    assert isinstance(again, Pivots) and again.pivots == made.pivots  # all of it is in `out`


def test_what_a_server_says_is_checked(tmp_path, chain, bytes_folder):
    problems = write_problems(tmp_path / "p.jsonl", {"question": "say:", "answer": "1"})
    ask, out = tmp_path / "ask.jsonl", tmp_path / "out"
    given: dict[str, Any] = {"tokenizer": bytes_folder, "requests": ask, "search_samples": 2, **HOW}
    pivots(problems, out, **given)
    whole = json.loads(Path(Server(chain, False).answer(ask, tmp_path / "a.jsonl")).read_text())

    def change(path: list[Any], value: Any) -> str:
        record = json.loads(json.dumps(whole))
        place = record["response"]["body"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / "b.jsonl").write_text(json.dumps(record))
        return str(tmp_path / "b.jsonl")

    one = ["choices", 1]
    for path, value, message in [
        (["model"], "other", "b.jsonl line 1: model is 'other', served_model is 'chain'"),
        (["choices"], [{}], "line 1: choices has 1 completions, 2 were asked for"),
        ([*one, "token_ids"], None, "choice 1: token_ids is null, a list of ids is needed"),
        ([*one, "token_ids"], ["a"], 'choice 1: token_ids is ."a".'),
        ([*one, "token_ids"], [5] * 9, 'finish_reason is "stop" after 9 tokens, .* within 8'),
        ([*one, "finish_reason"], "abort", 'choice 1: finish_reason is "abort" after'),
        ([*one, "logprobs"], None, "choice 1: logprobs.token_logprobs is null, 5 numbers"),
        ([*one, "logprobs", "token_logprobs"], [-1.0], r"token_logprobs is \[-1.0\], 5 numbers"),
        ([*one, "logprobs", "token_logprobs"], [None] * 5, "has .*null.*, not numbers alone"),
    ]:
        with pytest.raises(UserError, match=message):
            pivots(problems, out, responses=change(path, value), **given)
    assert (out / "rollouts.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"served_model": None}, "give one of target_model .a folder. and served_model"),
        ({"target_model": "x"}, "give one of target_model .a folder. and served_model"),
        ({"requests": None}, "requests is null: served_model needs it"),
        ({"tokenizer": None}, "tokenizer is null: served_model needs it"),
        ({"responses": "no.jsonl"}, "responses: no.jsonl is no file"),
        ({"served_model": None, "target_model": "x"}, "requests is '.*': that needs served_model"),
    ],
)
def test_ways_that_contradict_are_refused(tmp_path, bytes_folder, changes, message):
    problems = write_problems(tmp_path / "p.jsonl", {"question": "say:", "answer": "1"})
    given = {"tokenizer": bytes_folder, "requests": str(tmp_path / "ask.jsonl"), **HOW}
    with pytest.raises(UserError, match=message):
        pivots(problems, tmp_path / "out", **given | changes)
    assert not (tmp_path / "out").exists()
