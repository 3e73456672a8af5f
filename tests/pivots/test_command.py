"""`slm pivots` on a model whose probabilities are known, and on one that was trained on sums."""

import json
from pathlib import Path
from typing import Any

import pytest

from pivot_helpers import save_chain, write_problems
from slm.errors import UserError
from slm.pivots.command import Pivots, pivots
from slm.pivots.sampling import OwnModel

FILES = ["pivots.jsonl", "pairs.jsonl", "pivots.json", "rollouts.jsonl"]
HOW: dict[str, Any] = {"p_gap": 0.3, "search_gap": 0.25, "max_new_tokens": 8, "batch_size": 128}
HOW |= {"solutions": 4}  # as many as there are
SHARE = {"": 0.5, "a": 0.5, "ab": 0.5, "abc": 0.9, "abd": 0.1}
SHARE |= {"abc1": 1, "abd1": 1, "abc2": 0, "abd2": 0}


@pytest.fixture(scope="module")
def chain(tmp_path_factory, bytes_folder) -> str:
    folder = tmp_path_factory.mktemp("chain") / "model"
    save_chain(folder, bytes_folder)
    return str(folder)


@pytest.fixture
def problems(tmp_path) -> str:
    """The last is never solved."""
    asked = [{"question": f"{n}. say:", "answer": "1"} for n in range(4)]
    return write_problems(tmp_path / "p.jsonl", *asked, {"question": "say:", "answer": "3"})


def search(*given: Any, **how: Any) -> Pivots:
    made = pivots(*given, **HOW | how)
    assert isinstance(made, Pivots)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_pivots_and_pairs_are_those_of_the_chain(tmp_path, chain, problems):
    made = search(problems, tmp_path / "out", target_model=chain)
    found = {(row["prefix"], row["token"]) for row in made.pivots}
    # Every token that moves it by 0.3: what follows c or d as it mostly does moves it by 0.1.
    assert found == {("ab", "c"), ("ab", "d"), ("abc", "2"), ("abd", "1")}
    for row in made.pivots:
        before, after = SHARE[row["prefix"]], SHARE[row["prefix"] + row["token"]]
        assert row["success_before"] == pytest.approx(before, abs=0.25)
        assert row["success_after"] == pytest.approx(after, abs=0.25)
        assert row["gap_low"] <= row["success_after"] - row["success_before"] <= row["gap_high"]
        assert bytes(row["prefix_ids"]) and row["question"] != "5"
    pairs = {(row["prompt"][-2:], row["chosen"], row["rejected"]) for row in made.pairs}
    assert pairs == {("ab", "c", "d"), ("bc", "1", "2"), ("bd", "1", "2")}
    for row in made.pairs:
        shown = row["prompt"].rpartition(":")[2]
        assert row["chosen_success"] == pytest.approx(SHARE[shown + row["chosen"]], abs=0.3)
        assert row["rejected_success"] == pytest.approx(SHARE[shown + row["rejected"]], abs=0.3)
    one = made.summary
    assert (one["problems"], one["searched"]) == (5, 4) and one["ended"] == 1
    assert one["pairs"] == len(made.pairs) and 0 < one["expected_false"] < 0.05
    lines = (tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == made.pairs


def test_ids_are_those_of_prompt_and_completion(tmp_path, chain, problems, bytes_folder):
    from slm.store.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(bytes_folder)
    made = search(problems, tmp_path / "out", target_model=chain, prompt="Q {question}", limit=1)
    prompt = [tokenizer.eos_token_id, *tokenizer.encode("Q 0. say:")]
    assert {tuple(row["prompt_ids"]) for row in made.pivots} == {tuple(prompt)}
    for row in made.pivots:
        assert tokenizer.decode(row["prefix_ids"]) == row["prefix"]
        assert tokenizer.decode([row["token_id"]]) == row["token"]
    for row in made.pairs:
        assert row["prompt_ids"][: len(prompt)] == prompt
        assert tokenizer.decode(row["prompt_ids"][len(prompt) :]) in ("ab", "abc", "abd")
        assert tokenizer.encode(row["chosen"]) == row["chosen_ids"]


def test_a_killed_run_goes_on_and_draws_what_it_would_have_drawn(
    tmp_path, chain, problems, monkeypatch
):
    search(problems, tmp_path / "whole", target_model=chain)
    drawn = OwnModel.sample
    calls = 0

    def killed(self, *args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return drawn(self, *args)

    monkeypatch.setattr(OwnModel, "sample", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        search(problems, out, target_model=chain)
    assert not (out / "pivots.jsonl").exists()
    rollouts = out / "rollouts.jsonl"
    whole = rollouts.read_bytes()
    assert whole.count(b"\n") > 6  # five roots, and the first places within
    rollouts.write_bytes(whole[:-20])  # as if it had been killed as it wrote
    search(problems, out, target_model=chain)
    ours, theirs = contents(out), contents(tmp_path / "whole")
    for name in FILES[:3]:
        assert ours[name] == theirs[name]
    assert sorted(ours["rollouts.jsonl"].splitlines()) == sorted(
        theirs["rollouts.jsonl"].splitlines()
    )
    before = calls
    search(problems, out, target_model=chain)
    assert calls == before and contents(out) == ours  # all of it is there


def test_more_problems_and_other_gaps_draw_only_what_is_new(tmp_path, chain, problems, monkeypatch):
    out = tmp_path / "out"
    search(problems, out, target_model=chain, limit=1)
    before = (out / "rollouts.jsonl").read_bytes()
    search(problems, out, target_model=chain, limit=2, p_gap=0.4)
    after = (out / "rollouts.jsonl").read_bytes()
    assert after.startswith(before) and len(after) > 1.5 * len(before)
    questions = {json.loads(line)["question"] for line in after[len(before) :].splitlines()}
    assert len(questions) == 1
    write_problems(Path(problems), {"question": "0. say:", "answer": "2"})
    assert (
        search(problems, out, target_model=chain).summary["solved"] < 0.7
    )  # another's are not taken


ORACLE = """
def says_one(problem, text):
    assert set(problem) == {"question", "answer"} and not text.startswith("say")
    return text in ("abc1", "abd1")

def fails(problem, text):
    return 1 / (len(text) - 4)

def maybe(problem, text):
    return 1
"""


def test_an_oracle_of_ones_own_sees_record_and_completion(tmp_path, chain, problems):
    (tmp_path / "one_oracle.py").write_text(ORACLE)
    oracle = f"{tmp_path / 'one_oracle.py'}:says_one"
    made = search(problems, tmp_path / "a", target_model=chain, oracle=oracle)
    by_answer = search(problems, tmp_path / "b", target_model=chain, limit=4)
    tokens = [(row["question"], row["prefix"], row["token"]) for row in made.pivots]
    assert {one[1:] for one in tokens} == {(r["prefix"], r["token"]) for r in by_answer.pivots}
    assert "5" in {one[0] for one in tokens}  # it does not look at the answer


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (
            "failing_oracle.py:fails",
            r"oracle .*failing_oracle.py:fails raised ZeroDivisionError \(division by zero\) on "
            "problem 1, completion 'ab[cd][12]'$",
        ),
        ("vague_oracle.py:maybe", "oracle .* returned 1 on problem 1, it must be True or False$"),
        (
            "empty_oracle.py:nobody",
            "oracle is '.*:nobody', and .*empty_oracle.py has no function nobody",
        ),
        ("no_oracle.py:f", "oracle is '.*no_oracle.py:f', and there is no file .*no_oracle.py"),
        ("broken_oracle.py:f", "and .*broken_oracle.py cannot be imported .SyntaxError: "),
    ],
)
def test_an_oracle_that_fails_is_one_sentence(tmp_path, chain, problems, oracle, message):
    (tmp_path / oracle.partition(":")[0]).write_text(ORACLE)
    (tmp_path / "no_oracle.py").unlink(missing_ok=True)
    (tmp_path / "broken_oracle.py").write_text("def f(")
    with pytest.raises(UserError, match=message) as refused:
        search(
            problems,
            tmp_path / "out",
            target_model=chain,
            oracle=f"{tmp_path}/{oracle}",
            limit=1,
        )
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "pivots.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"oracle": "passes"},
            "oracle is 'passes', it must be answer, module:function or file.py:",
        ),
        ({"oracle": "no_such_module:f"}, "oracle is .*, and no_such_module cannot be imported"),
        ({"keep": [0.8, 0.2]}, r"keep is \[0.8, 0.2\]: the first must be at most the second"),
        ({"confirm_samples": 2}, "confirm_samples is 2 and level 0.05: so few samples confirm"),
        ({"max_new_tokens": 60}, "the longest prompt has 8 tokens and max_new_tokens is 60, .* 64"),
        ({"problems": "no.jsonl"}, "no.jsonl: No such file"),
        ({"target_model": "no"}, "target_model no: there is no such folder"),
        ({"format": "gsm8k"}, "p.jsonl:1: answer has no ####"),
        ({"prompt": "Q"}, "prompt is 'Q', it must be a text with {question} in it, or null"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, chain, problems, changes, message):
    given = {"target_model": chain, "problems": problems, "out": tmp_path / "out"}
    with pytest.raises(UserError, match=message):
        search(**given | changes)
    assert not (tmp_path / "out" / "rollouts.jsonl").exists()


def test_records_that_are_no_problems_are_refused(tmp_path, chain):
    for record, message in [
        ({"answer": "1"}, "p.jsonl:1: field 'question' is missing"),
        ({"question": "say:"}, "problem 1 has no answer, which oracle=answer compares"),
    ]:
        path = write_problems(tmp_path / "p.jsonl", record)
        with pytest.raises(UserError, match=message):
            search(path, tmp_path / "out", target_model=chain)
    twice = [{"question": f"{n} say:", "answer": "1", "id": "x"} for n in range(2)]
    with pytest.raises(UserError, match="p.jsonl:2: id is 'x', and so is an earlier one's"):
        search(
            write_problems(tmp_path / "p.jsonl", *twice),
            tmp_path / "out",
            target_model=chain,
        )
    with pytest.raises(UserError, match="problems: .*p.jsonl has none"):
        search(write_problems(tmp_path / "p.jsonl"), tmp_path / "out", target_model=chain)


def test_completions_of_something_else_are_not_taken(tmp_path, chain, problems, bytes_folder):
    out = tmp_path / "out"
    search(problems, out, target_model=chain, limit=1)
    holds = "holds completions made with other settings"
    with pytest.raises(UserError, match=f"{holds}: temperature is 1.0"):
        search(problems, out, target_model=chain, limit=1, temperature=0.5)
    save_chain(tmp_path / "other", bytes_folder, {":": {"1": 0.5, "2": 0.5}})
    with pytest.raises(UserError, match=f"{holds}: model is"):
        search(problems, out, target_model=tmp_path / "other", limit=1)
    (out / "pairs.jsonl").write_text("mine")
    with pytest.raises(UserError, match="pairs.jsonl would be replaced"):
        search(problems, out, target_model=chain, limit=1)


def test_what_does_not_end_is_wrong(tmp_path, chain, problems):
    """`abc1` are four tokens and the EOS is the fifth: none fits."""
    made = search(problems, tmp_path / "out", target_model=chain, max_new_tokens=4)
    assert (made.summary["ended"], made.summary["solved"], made.pivots) == (0, 0, [])
