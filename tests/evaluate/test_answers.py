"""What counts as one value, in tables of pairs; what a completion gives as its answer."""

import pytest

from slm.evaluate.answers import extract, is_right, number, same_value

pytest.importorskip("math_verify")

EQUAL = [
    ("1999", "1,999"),
    ("1000000", "1,000,000"),
    ("11111", r"11,\! 111"),
    ("5", r"\$5"),
    ("52_8", "52_{8}"),
    ("52_8", "42"),
    ("40_9", "100_6"),
    ("5", "5."),
    ("2.1", "$ 2.10"),
    ("-5", "\u22125"),
    ("0.15", ".15"),
    ("90", "**90**"),
    ("130", "rs . 130"),
    ("18", "18 ducks"),
    ("18", "$18 per day"),
    ("60", "60 km/h"),
    ("9 cm", "9"),
    ("145", r"145^\circ"),
    ("5", r"5 \text{ inches}"),
    ("x=5", "5"),
    ("9", "5 + 4 = 9"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac{2}{4}", "1/2"),
    (r"-\frac{2}{3}", r"\frac{-2}{3}"),
    ("1.5", r"1 \frac{1}{2}"),
    ("1.5", "1 1/2"),
    ("1.5", "3 : 2"),
    ("1 : 3", r"\frac{1}{3}"),
    ("0.3333", r"\frac13"),
    ("33.33", r"\frac{100}{3}"),
    ("0.6667", "2 / 3"),
    ("50\\%", "0.5"),
    ("28 %", "28"),
    ("28%", "0.28"),
    ("1/2", "50 percent"),
    (r"\sqrt{2}", "1.41421"),
    (r"6 \pi", "18.8495559"),
    ("10^{-3}", "0.001"),
    ("p - q", "-q + p"),
    ("2k+2", "2(k+1)"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    (r"1 \pm \sqrt{19}", r"1 - \sqrt{19}, 1 + \sqrt{19}"),
    ("1,-2", "-2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("[2,5)", "[2, 5)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1.0\\2\end{pmatrix}"),
    (r"\text{Evelyn}", "Evelyn"),
    ("They are equal", "they are equal."),
    ("3:30 p.m.", "3:30 p.m."),
]
UNEQUAL = [
    ("18", "-18"),
    ("52_8", "52"),
    ("52_8", "52_9"),
    ("12345", "12346"),  # within one part in 10,000, and whole
    ("0.5", "50"),  # no sign of percent
    ("1234", "1.234"),
    ("3", "0.3"),
    ("1/2", "1/3"),
    ("0.33", "0.34"),
    ("23", "2*3"),
    ("2", "2x"),
    ("2", r"\sqrt{2}"),
    ("p - q", "q - p"),
    ("[2,5)", "[2,5]"),
    ("(1,2)", "(2,1)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("Evelyn", "nylevE"),  # as a product of letters they are equal
    ("3:30 p.m.", "7:70 p.m."),
    ("5", "five"),
    ("5", "1/0"),
    ("5", ""),
    ("", ""),
    (r"\frac{1}{2}", r"\frac{1}{2"),
    ("5", r"\frac{"),
]


@pytest.mark.parametrize(("answer", "said"), EQUAL)
def test_equal_values(answer, said):
    assert same_value(answer, said)


@pytest.mark.parametrize(("answer", "said"), UNEQUAL)
def test_other_values(answer, said):
    assert not same_value(answer, said) and not same_value(said, answer)


def test_plain_numbers_wait_for_no_algebra(monkeypatch):
    monkeypatch.setattr("slm.evaluate.answers.import_module", None)
    assert same_value("1,999", "1999") and not same_value("1,999", "1998")
    assert number("9^9") is None and number("1/0") is None


def test_a_power_tower_ends_and_is_unequal(monkeypatch):
    monkeypatch.setattr("slm.evaluate.answers.LIMIT_S", 1)
    assert not same_value("5", "9^{9^{9^{9}}}")


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("6 * 7 = 42. The answer is 42.", "42"),
        ("So the answer is $1,999.50.\nAnd more.", "$1,999.50"),
        ("The answer is 3. No, the answer is 4. Then 5 + 5 = 10", "4"),
        ("The answer is: 18 ducks", "18 ducks"),
        ("9 + 9 = <<9+9=18>>18\n#### 18", "18"),
        ("it is 3.5 and -0.25", "-0.25"),
        ("it is .5", ".5"),
        ("10-5", "5"),
        (r"first \boxed{3}, so the answer is $\boxed{\frac{1}{2}}$. 7", r"\frac{1}{2}"),
        (r"The final answer is $(1, 2]$. I hope it is correct.", "$(1, 2]$"),
        ("nothing", ""),
        ("", ""),
    ],
)
def test_the_answer_of_a_completion(completion, found):
    assert extract(completion) == found


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("The answer is (C).", True),
        ("the correct choice is C", True),
        ("The answer is c.", True),
        ("The answer is c)", True),
        (r"So \boxed{C}", True),
        (r"So $\boxed{\text{(C)}}$", True),
        ("The answer is (E).", True),  # as much as (C)
        ("The answer is 16.", True),
        ("The answer is 16 km.", True),
        ("The answer is (A).", False),
        ("The answer is (F).", False),  # no choice
        ("The answer is a stone.", False),
        ("The answer is 12.", False),
        ("The answer is (A). The answer is (C).", False),  # the first counts, as in the paper
        ("16", False),  # no answer is given
        ("", False),
    ],
)
def test_choices_are_compared_as_values(completion, right):
    choices = ["12 km", "14 km", "16 km", "18 km", "16.0 km"]
    assert is_right(extract(completion, 5), "C", choices) == right
