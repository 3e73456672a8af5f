"""Which tokens decide whether a model solves a problem? `slm pivots` (see --help).

    plan.json        what the completions are drawn from; another is refused in the same folder
    rollouts.jsonl   all completions, as they are drawn
    pivots.jsonl     a confirmed pivot a line, with its counts and the interval of its gap
    pairs.jsonl      a pair of tokens a line: prompt_ids, chosen_ids, rejected_ids and their texts
    pivots.json      what was asked, tried and found, and how many pivots are false at most
    pivots.html      each pivot where it was said
    made.json        the hashes of these four, which the next call replaces

The same command goes on after a kill, and with other gaps or more problems it draws only what is
new. Costs the completions: 30 to 60 of each place, about 10 places for each pivot of a completion.
"""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from slm.command_keys import PIVOTS
from slm.errors import UserError
from slm.evaluate.generation import Sampling
from slm.model.build import ids_of
from slm.model.device import pick_device
from slm.model.folder import model_sha256
from slm.pivots.chance import interval, noise, threshold
from slm.pivots.measure import PHASES, Measured, Unanswered
from slm.pivots.page import page
from slm.pivots.pairs import Pair, pairs_of
from slm.pivots.questions import Judge, Question, encoder, read_questions
from slm.pivots.rollouts import Rollouts
from slm.pivots.sampling import OwnModel, Sampler
from slm.pivots.search import Confirmed, Node, Pivot, confirm, search
from slm.pivots.served import Asked, Served, write_requests
from slm.prepare.chat import end_of_turn
from slm.score.batch import response_files
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.claims import claim
from slm.store.files import Json, atomic_file, write_json
from slm.store.hub import check_model_folder, is_folder
from slm.store.own_files import check_own, replacing
from slm.store.shards import adopt_plan
from slm.store.tokenizer import load_tokenizer, tokenizer_sha256

log = logging.getLogger("slm.pivots")
MADE_BY = "slm pivots"
FILES = ("pivots.jsonl", "pairs.jsonl", "pivots.json", "pivots.html")


class Pivots(NamedTuple):
    """What a search left."""

    folder: Path
    pivots: list[Json]
    pairs: list[Json]
    summary: Json  # pivots.json


def plan_of(config: Any, tokenizer: Any, judge: Judge) -> Json:
    """What a completion and its verdict depend on, beside its question."""
    own = config.target_model is not None
    return {
        "kind": "pivots",
        "model": model_sha256(config.target_model) if own else config.served_model,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "oracle": judge.identity(),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "search_samples": config.search_samples,
        "confirm_samples": config.confirm_samples,
        "dtype": config.dtype if own else None,  # a server's own
        "seed": config.seed,
    }


def check_way(config: Any) -> None:
    """Which model completes, and how it is asked."""
    if (config.target_model is None) == (config.served_model is None):
        raise UserError("give one of target_model (a folder) and served_model (a server's name)")
    for key in ("requests", "responses", "tokenizer"):
        if config.target_model is not None and getattr(config, key) is not None:
            raise UserError(f"{key} is {getattr(config, key)!r}: that needs served_model")
    for key in ("requests", "tokenizer"):
        if config.served_model is not None and getattr(config, key) is None:
            raise UserError(f"{key} is null: served_model needs it")
    if config.target_model is not None and is_folder("target_model", config.target_model):
        check_model_folder("target_model", config.target_model)


def check_settings(config: Any) -> None:
    low, high = config.keep
    if low > high:
        raise UserError(f"keep is [{low}, {high}]: the first must be at most the second")
    least = threshold(config.p_gap, config.confirm_samples, config.level)
    if least > config.confirm_samples:
        raise UserError(
            f"confirm_samples is {config.confirm_samples} and level {config.level}: so few samples "
            "confirm nothing at that level"
        )


# ---- the work -----------------------------------------------------------------------------------


class Found(NamedTuple):
    shares: list[float]  # of each problem's completions that are right
    num_searched: int
    num_candidates: int
    confirmed: Confirmed
    pairs: list[Pair]


def find(config: Any, measured: Measured) -> Found:
    """Questions -> solutions -> candidates -> pivots -> pairs."""
    roots = [Node(key, ()) for key in measured.questions]
    counts = measured.right("search", roots)
    low, high = config.keep
    shares = {node.question: counts[node] / config.search_samples for node in roots}
    kept = [key for key, share in shares.items() if low <= share <= high]
    log.info(solved(list(shares.values()), config.keep))
    solutions = [one for key in kept for one in measured.solutions(key, config.solutions)]
    candidates = search(
        solutions, partial(measured.right, "search"), config.search_samples, config.search_gap
    )
    least = threshold(config.p_gap, config.confirm_samples, config.level)
    right = partial(measured.right, "confirm")
    confirmed = confirm(candidates, right, config.confirm_samples, least)
    places = dict.fromkeys(one.candidate.before for one in confirmed.pivots)
    firsts = {node: measured.store.firsts(node, PHASES) for node in places}
    made = pairs_of(
        confirmed.pivots, config.confirm_samples, firsts, config.pair_samples, config.level
    )
    return Found(list(shares.values()), len(kept), len(candidates), confirmed, made)


def solved(shares: Sequence[float], keep: Sequence[float]) -> str:
    low, high = keep
    below, above = sum(one < low for one in shares), sum(one > high for one in shares)
    return (
        f"{len(shares) - below - above} of {len(shares)} problems are solved in {low:.0%} to "
        f"{high:.0%} of their completions, {below} more seldom, {above} more often"
    )


# ---- what is written ----------------------------------------------------------------------------


class Texts:
    """Rows of the files: ids, and texts for readers."""

    def __init__(self, questions: dict[str, Question], tokenizer: Any):
        self.questions, self.tokenizer = questions, tokenizer

    def prompt_ids(self, node: Node) -> list[int]:
        return [*self.questions[node.question].prompt_ids, *node.prefix]

    def pivot(self, one: Pivot, samples: int) -> Json:
        node, token = one.candidate.before, one.candidate.token
        low, high = interval(one.right_before, one.right_after, samples)
        return {
            "question": self.questions[node.question].id,
            "prompt_ids": self.questions[node.question].prompt_ids,
            "prefix_ids": list(node.prefix),
            "token_id": token,
            "prompt": self.tokenizer.decode(self.questions[node.question].prompt_ids),
            "prefix": self.tokenizer.decode(list(node.prefix)),
            "token": self.tokenizer.decode([token]),
            "success_before": one.right_before / samples,
            "success_after": one.right_after / samples,
            "right_before": one.right_before,
            "right_after": one.right_after,
            "samples": samples,
            "gap_low": low,
            "gap_high": high,
        }

    def pair(self, one: Pair) -> Json:
        ids = self.prompt_ids(one.before)
        return {
            "question": self.questions[one.before.question].id,
            "prompt_ids": ids,
            "chosen_ids": [one.chosen],
            "rejected_ids": [one.rejected],
            "chosen_success": one.chosen_success,
            "rejected_success": one.rejected_success,
            "prompt": self.tokenizer.decode(ids),
            "chosen": self.tokenizer.decode([one.chosen]),
            "rejected": self.tokenizer.decode([one.rejected]),
        }


def summary_of(config: Any, measured: Measured, found: Found) -> Json:
    least = threshold(config.p_gap, config.confirm_samples, config.level)
    store = measured.store
    return {
        "problems": len(measured.questions),
        "searched": found.num_searched,
        "solved": sum(found.shares) / len(found.shares),
        "candidates": found.num_candidates,
        "pivots": len(found.confirmed.pivots),
        "expected_false": found.confirmed.expected_false,
        "pairs": len(found.pairs),
        "least_right": least,
        "chance_of_noise": noise(config.confirm_samples, least),
        "completions": store.num_samples,
        "ended": store.num_ended / max(1, store.num_samples),
        "tokens": store.num_tokens,
        "settings": {key: getattr(config, key) for key in SETTINGS},
    }


SETTINGS = (
    *("p_gap", "search_gap", "search_samples", "confirm_samples", "level", "solutions", "keep"),
    *("pair_samples", "temperature", "top_p", "max_new_tokens", "seed"),
)


def write_rows(path: Path, rows: Sequence[Json]) -> None:
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


# ---- the command --------------------------------------------------------------------------------


@stage(PIVOTS)
def pivots(
    problems: Folder,
    out: Folder,
    *,
    target_model: Folder | None = None,
    served_model: str | None = None,
    tokenizer: Folder | None = None,
    requests: Folder | None = None,
    responses: Folder | Sequence[Folder] | None = None,
    oracle: str = "answer",
    format: str | None = None,
    prompt: str | None = None,
    limit: int | None = None,
    p_gap: float = 0.2,
    search_gap: float = 0.15,
    search_samples: int = 32,
    confirm_samples: int = 64,
    level: float = 0.05,
    keep: Sequence[float] = (0.2, 0.8),
    solutions: int = 2,
    pair_samples: int = 5,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str = "auto",
    modules: Sequence[str] = (),
) -> Pivots | Path:
    """Find the tokens that decide whether a model solves problems, and pairs to train it on.

    Args:
        problems: JSON lines with `question` and `answer`, or a file of a set (`format`).
        out: folder of completions, pivots and pairs. The same call again goes on where it was.
        target_model: a model folder, GGUF included.
        served_model: in place of it: a server's name of the model.
        tokenizer: with served_model: a folder with the model's tokenizer.
        requests: with served_model: a file to write: what to ask the server next.
        responses: the files with what the server has answered.
        oracle: "answer" compares the final answer as a value; "module:function" or
            "file.py:function" is called with a problem's record and a completion's text.
        format: None, or the set of `slm harness` that the file is of: "gsm8k", "math_500", ...
        prompt: what the model is given, with {question} in it; None: the tokenizer's chat template
            where it has one, else the question.
        limit: only the first so many problems.
        p_gap: a pivot moves the probability of success by so much.
        search_gap: where the search still looks, by estimates of fewer samples.
        search_samples: completions of each place that the search looks at.
        confirm_samples: fresh ones before and behind each candidate.
        level: the chance at which a token that moves nothing is confirmed, or taken for a pair.
        keep: only problems that are solved in so many of their completions.
        solutions: completions of each problem that are searched, right and wrong ones in turn.
        pair_samples: so many completions must begin with the other token of a pair.
        max_new_tokens: of a whole completion; one that does not end is wrong.
        temperature: of sampling.
        top_p: sample from the likeliest tokens that have this probability together.
        seed: of the sampling.
        batch_size: completions per forward.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.

    Returns:
        The rows of pivots.jsonl and pairs.jsonl, and pivots.json; with served_model the file of
        requests until all is answered.

    Raises:
        UserError: a problem cannot be read, the oracle raises, `out` has completions made with
            other settings; a setting is wrong.
    """
    config = SimpleNamespace(**locals())
    import_modules(modules)
    pick_device(device)
    check_settings(config)
    check_own(Path(out), FILES, MADE_BY)
    check_way(config)
    folder: Any = target_model or tokenizer
    texts: Any = load_tokenizer(folder)
    judge = Judge(oracle)
    encode = encoder(folder, texts, prompt)
    asked = {one.key: one for one in read_questions(config.problems, format, limit, encode)}
    judge.check([*asked.values()])
    prompts = {key: one.prompt_ids for key, one in asked.items()}
    plan = plan_of(config, texts, judge)
    server = Asked(plan, served_model, prompts) if served_model is not None else None
    own = server is None
    sampler = own_model(config, texts, prompts) if own else answered(config, server, texts)
    adopt_plan(Path(out), plan, "completions made with other settings")
    with claim(Path(out) / "rollouts.claim") as mine:
        if mine is None:
            raise UserError(f"{out}: another process draws completions there")
        samples = {phase: plan[f"{phase}_samples"] for phase in PHASES}
        store = Rollouts(Path(out), sampler.stops)
        measured = Measured(store, sampler, judge, asked, texts, samples)
        try:
            return write(config, measured, find(config, measured))
        except Unanswered as missing:
            assert server is not None, missing
            return write_requests(server, missing, Path(config.requests))


def own_model(config: Any, tokenizer: Any, prompts: dict[str, list[int]]) -> Sampler:
    how = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    more = {key: getattr(config, key) for key in ("seed", "batch_size", "dtype", "device")}
    return OwnModel(config.target_model, tokenizer.eos_token_id, prompts, how, **more)


def answered(config: Any, server: Asked, tokenizer: Any) -> Sampler:
    stops = [tokenizer.eos_token_id, *ids_of(end_of_turn(tokenizer))]
    paths = response_files(config.responses) if config.responses is not None else []
    return Served(server, list(dict.fromkeys(stops)), paths)


def write(config: Any, measured: Measured, found: Found) -> Pivots:
    texts = Texts(dict(measured.questions), measured.tokenizer)
    rows = [texts.pivot(one, config.confirm_samples) for one in found.confirmed.pivots]
    pairs = [texts.pair(one) for one in found.pairs]
    summary = summary_of(config, measured, found)
    with replacing(Path(config.out), MADE_BY) as to:
        write_rows(to / "pivots.jsonl", rows)
        write_rows(to / "pairs.jsonl", pairs)
        write_json(to / "pivots.json", summary)
        with atomic_file(to / "pivots.html") as file:
            file.write(page(rows, said(summary)).encode())
    return Pivots(Path(config.out), rows, pairs, summary)


def said(one: Json) -> str:
    """Of pivots.json, in a sentence."""
    return (
        f"{one['searched']} of {one['problems']} problems searched, {one['candidates']} "
        f"candidates, {one['pivots']} pivots confirmed, of which at most "
        f"{one['expected_false']:.2g} are expected to move nothing; {one['pairs']} pairs"
    )


def run(**settings: Any) -> None:
    made = pivots(**settings)
    if isinstance(made, Path):
        log.info(f"requests: {made}; the same command with their answers as `responses` goes on")
        return
    one = made.summary
    print(said(one))
    drawn = f"{one['completions']:,} completions, {one['tokens']:,} tokens"
    log.info(f"{drawn}, {one['ended']:.0%} ended by themselves: {made.folder}")
