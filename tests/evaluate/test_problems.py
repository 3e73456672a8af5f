"""Records of the nine sets, and prompts that hold no problem that is asked."""

import json

import pytest

from slm.errors import UserError
from slm.evaluate.answers import extract, is_right
from slm.evaluate.problems import (
    SETS,
    asdiv,
    check_prompt,
    decimal,
    few_shot_prompt,
    find_file,
    gsm8k,
    math_500,
    mathqa,
    mawps,
    mmlu_stem,
    read_problems,
    sat_math,
    split_options,
    svamp,
    tabmwp,
)
from text_helpers import DATA, needs_data, write_records

pytest.importorskip("math_verify")

TABLE = {
    "question": "How many more pens than cups? ",
    "choices": None,
    "answer": "1,200",
    "table_title": "Sold",
    "table": "pens | 1,300\ncups | 100",
    "solution": "1,300 - 100 = 1,200",
}


def test_records_of_words_become_problems():
    one = gsm8k({"question": " a? ", "answer": "b #### c\n#### 1,234"})
    assert one == ("a?", "b #### c\n#### 1,234", "1234", ())
    boxed = {"problem": "Halve it.", "solution": r"\boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}"}
    assert math_500(boxed)[1:] == (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", ())
    body = {"Body": "There are 290 bananas", "Question": "How many in a group?", "Answer": 145.0}
    assert svamp(body).question == "There are 290 bananas. How many in a group?"
    ran = svamp({"Body": "Tom ran. ", "Question": " How far? ", "Answer": 2.5})
    assert ran == ("Tom ran. How far?", "2.5", "2.5", ())
    assert mawps({"input": "How many? ", "target": 43.0}) == ("How many?", "43", "43", ())
    nine = {"body": "7 red, 2 green.", "question": "In all? ", "answer": "9 (apples)"}
    assert asdiv(nine | {"formula": "7+2=9"}) == ("7 red, 2 green. In all?", "7+2=9", "9", ())
    yes = asdiv(nine | {"formula": "7>2", "answer": "Yes"})
    assert yes.question == "7 red, 2 green. In all? (Yes or No)" and yes.answer == "Yes"
    assert [decimal(x) for x in (145.0, 2.5, -3.0, 0.1, 1e6)] == [
        "145", "2.5", "-3", "0.1", "1000000",
    ]  # fmt: skip


def test_a_table_stands_before_its_question():
    plain = tabmwp(TABLE)
    assert plain.asked == (
        'Read the table "Sold" and answer.\npens | 1,300\ncups | 100\nHow many more pens than cups?'
    )
    assert plain[1:] == ("1,300 - 100 = 1,200", "1,200", ())
    chosen = tabmwp(TABLE | {"choices": ["pens", "cups"], "answer": "pens", "table_title": None})
    assert chosen.asked.startswith("Read the table and answer.\n")
    assert chosen.asked.endswith("How many more pens than cups? Choose from: pens, cups.")


def test_records_with_choices_become_problems():
    record = {"problem": "x ?", "options": "a ) 12 , b ) b ) 16 cm , c ) 1,800", "correct": "b"}
    one = mathqa(record | {"rationale": '"12 + 4 = 16"'})
    assert one == ("x ?", "12 + 4 = 16\nThe answer is (B).", "B", ("12", "16 cm", "1,800"))
    assert one.asked == "x ?\nWhich choice is right?\n(A) 12, (B) 16 cm, (C) 1,800"
    listed = record | {"options": "['a ) 6 cm', 'b ) none of these']", "rationale": ""}
    assert mathqa(listed).choices == ("6 cm", "none of these")
    sat = sat_math({"question": "y?", "options": "A) $R(0)$ B) 3.30 C) B. or not", "Answer": "B"})
    assert sat.choices == ("$R(0)$", "3.30", "B. or not")
    assert sat.solution == "The answer is (B)."
    dotted = "A. Rana's sample is D. B. Micha's is."
    assert split_options(dotted, "ABCD") == ["Rana's sample is D.", "Micha's is."]
    stem = mmlu_stem({"question": "z?", "choices": ["a", 2, "c", "d"], "answer": 3})
    assert (stem.answer, stem.choices) == ("D", ("a", "2", "c", "d"))


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        (
            "mathqa",
            {"problem": "p", "options": "a ) 1", "correct": "a", "rationale": ""},
            "expected",
        ),
        ("mathqa", {"problem": "p", "options": "['a", "correct": "a", "rationale": ""}, ""),
        (
            "sat_math",
            {"question": "q", "options": "A) 1 B) 2", "Answer": "C"},
            "'C', there are 2 ch",
        ),
        ("mmlu_stem", {"question": "q", "choices": ["a"], "answer": 26}, "out of range"),
        ("mmlu_stem", {"question": "q", "choices": ["a"], "answer": 1}, "'B', there are 1 choices"),
        ("tabmwp", {"question": "q"}, "field 'table_title' is missing"),
        ("mawps", {"input": "q", "target": "x"}, ""),
    ],
)
def test_a_damaged_record_is_named(tmp_path, name, record, message):
    path = write_records(tmp_path / SETS[name].file, record)
    with pytest.raises(UserError, match=f"{SETS[name].file}:1: .*{message}"):
        read_problems(path, SETS[name].read)


def test_files_lie_in_a_folder_or_as_in_math_evaluation_harness(tmp_path):
    own = tmp_path / "math_500.jsonl"
    theirs = tmp_path / "math_oai" / "test.jsonl"
    with pytest.raises(UserError, match="math_500.jsonl is missing: problems must be the folder"):
        find_file(tmp_path, SETS["math_500"])
    write_records(theirs, {})
    assert find_file(tmp_path, SETS["math_500"]) == theirs
    write_records(own, {})
    assert find_file(tmp_path, SETS["math_500"]) == own


# ---- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({one.prompt for one in SETS.values()}))
def test_examples_end_in_an_answer_that_is_found(name):
    *examples, last = few_shot_prompt(name).split("\n\n")
    mark = "Answer:" if name == "words" else "Solution:"
    assert len(examples) == (8 if name == "words" else 4)
    assert last.splitlines()[-2].endswith("{question}") and last.splitlines()[-1] == mark
    for example in examples:
        question, solution = example.split(mark)
        assert "The answer is " in solution
        assert extract(solution, 4 * (name == "choices"))
        assert "{question}" not in question


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "math_500", "svamp", "mawps", "mathqa", "sat_math"])
def test_no_problem_of_a_real_file_stands_in_its_prompt_and_each_solution_is_right(name):
    one = SETS[name]
    problems = read_problems(find_file(DATA / "eval", one), one.read)
    check_prompt(few_shot_prompt(one.prompt), problems, DATA)
    for problem in problems[:50]:
        said = problem.solution.splitlines()[-1] if problem.choices else problem.solution
        assert is_right(extract(said, len(problem.choices)), problem.answer, problem.choices)


LONG = "A farmer has 12 hens and buys 7 more on each of the next 3 days."


@pytest.mark.parametrize(
    "prompt",
    [
        f"Question: {LONG}\nAnswer: 33.",
        "Then a FARMER has 12 hens, and buys 7 more (on each of the next 3 days) {question}",
        "Why is it? Since 13 words: a farmer has 12 hens and buys 7 more on each of the",
        "Halve   it!",
    ],
)
def test_a_prompt_that_holds_a_problem_is_refused(tmp_path, prompt):
    problems = [svamp({"Body": LONG, "Question": "How many?", "Answer": 33.0})]
    problems.append(math_500({"problem": "Halve it.", "solution": "", "answer": "1"}))
    with pytest.raises(UserError, match="f.jsonl: the prompt holds a problem that is asked: '"):
        check_prompt(prompt, problems, tmp_path / "f.jsonl")


@pytest.mark.parametrize(
    "prompt",
    ["Question: {question}\nAnswer:", "A farmer has 12 hens and buys 7 more.", "Halved it", ""],
)
def test_a_prompt_with_fewer_words_of_it_is_none(tmp_path, prompt):
    problems = [svamp({"Body": LONG, "Question": "How many?", "Answer": 33.0})]
    problems.append(math_500({"problem": "Halve it.", "solution": "", "answer": "1"}))
    check_prompt(prompt, problems, tmp_path)


def test_the_files_of_prompts_are_text_as_it_is_shown():
    assert json.dumps(few_shot_prompt("latex")).count("\\\\\\\\") == 0  # one backslash each
