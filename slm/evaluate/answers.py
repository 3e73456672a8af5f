"""Answers to mathematics: what a completion gives as its own, and whether two are one value.

`extract` finds the answer where math-evaluation-harness, which made Table 1 of the Rho-1 paper,
looks for it: the last \\boxed{}, else what follows "the answer is", else the last number; of a
problem with choices, the first letter after "answer is" or "choice is". `same_value` compares
values: 1,999 is 1999, 50% is 0.5, \\frac{2}{4} is 1/2, and choice (C) is what stands at C.

Whole numbers are equal or not; where one is a decimal, one part in 10,000 is left to rounding, as
in that harness. It also takes 50 for 0.5 and 12,345 for 12,346; here a percentage has its sign, and
whole numbers leave nothing to rounding. LaTeX that is no plain number goes to math-verify, on SymPy
and without `eval`, with 20 s for a comparison: what takes longer counts as unequal.
"""

import logging
import re
import string
from collections.abc import Sequence
from fractions import Fraction
from importlib import import_module
from typing import Any, NamedTuple

# A minus after a digit or a bracket subtracts. A comma counts between groups of three digits.
NUMBER = r"(?:(?<![\d)\]])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
TOLERANCE = Fraction(1, 10_000)
LIMIT_S = 20  # of algebra for one comparison


# ---- what a completion says ---------------------------------------------------------------------


def balanced(depth: int) -> str:
    """A regex for text whose braces match, at most `depth` deep."""
    inner = balanced(depth - 1) if depth else ""
    return rf"(?:[^{{}}]|\{{{inner}\}})*" if depth else r"[^{}]*"


BOXED = re.compile(rf"\\boxed\s*\{{({balanced(5)})\}}")
# To the end of its sentence: a point between digits ends none.
SAID = re.compile(r"(?:answer|choice) is:?\s*(.*?)(?:\.?\s*$|[.!](?=\s)|\n)", re.I | re.M)
LAST = re.compile(rf"-?\.\d+|{NUMBER}")
LETTER = re.compile(r"[*$\s]*(?:\\text\{)?\(?(?:(?P<any>[A-Za-z])\s*(?:\)|$)|(?P<capital>[A-Z])\b)")


def extract(completion: str, num_choices: int = 0) -> str:
    """The answer of a completion, "" where it gives none; of choices a letter, or a value."""
    boxed, said = BOXED.findall(completion), SAID.findall(completion)
    if num_choices:
        found = said[:1] or boxed[-1:] or [""]
        return chosen(found[0], string.ascii_uppercase[:num_choices])
    numbers = LAST.findall(completion)
    return (boxed[-1:] or said[-1:] or numbers[-1:] or [""])[0].strip()


def chosen(said: str, letters: str) -> str:
    """The letter that it begins with, (B) or B or b alone; else the text, which may be a value."""
    found = LETTER.match(said)
    letter = "" if found is None else (found["any"] or found["capital"]).upper()
    return letter if letter and letter in letters else said.strip()


def is_right(said: str, answer: str, choices: Sequence[str] = ()) -> bool:
    """Is what was extracted the answer, which is a letter where there are choices?"""
    if not choices:
        return same_value(answer, said)
    letters = string.ascii_uppercase[: len(choices)]
    value = choices[letters.index(said)] if len(said) == 1 and said in letters else said
    return said == answer or same_value(choices[letters.index(answer)], value)


# ---- values -------------------------------------------------------------------------------------


class Number(NamedTuple):
    value: Fraction
    is_percent: bool


WRAPPER = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
CLEARED = re.compile(r"\\[!,;: ]|\\?\$|\\left|\\right|(?<=\d),(?=\d{3}(?!\d))|\*\*|`")
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))")
BASED = re.compile(r"(\d+)_\{?(\d{1,2})\}?")
UNIT = r"(?:\s+(?:[a-z]{2,}|[glhms])(?:[\s/-]+[a-z]+)*)"
PLAIN = re.compile(
    r"(?:rs\s?\.?|[€£¥]|[a-z]\s*=)?\s*"
    r"(?P<sign>[-+\u2212]?)\s*(?:(?P<whole>\d+)\s+(?=\d+\s*/))?"
    r"(?P<top>\d+\.?\d*|\.\d+)\s*(?:[/:]\s*(?P<bottom>\d+\.?\d*))?\s*"
    rf"(?P<percent>\\?%|percent)?{UNIT}?(?:\^\{{?\\circ\}}?|°)?\.?",
    re.I,
)


def number(text: str) -> Number | None:
    """A number in digits, with currency, unit, base or %: -2/3; 1 1/2; $ 2.10; 28 %; 52_8."""
    if (found := BASED.fullmatch(text)) is not None:  # math-verify takes the digits as decimal
        digits, base = found[1], int(found[2])
        fits = 2 <= base <= 36 and all(int(digit) < base for digit in digits)
        return Number(Fraction(int(digits, base)), False) if fits else None
    text = FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text).strip()
    found = PLAIN.fullmatch(text)
    if found is None:
        return None
    bottom = Fraction(found["bottom"] or 1)
    if bottom == 0:
        return None
    value = Fraction(found["whole"] or 0) + Fraction(found["top"]) / bottom
    return Number(-value if found["sign"] in ("-", "\u2212") else value, bool(found["percent"]))


def is_close(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def same_number(a: Number, b: Number) -> bool:
    values = [b.value]
    if a.is_percent != b.is_percent:
        values.append(b.value / 100 if b.is_percent else b.value * 100)
    return any(is_close(a.value, value) for value in values)


def cleared(text: str) -> str:
    """Without what changes no value: dollar signs, commas in numbers, spacing, \\text around."""
    text = CLEARED.sub("", WRAPPER.sub(r" \1 ", text))
    return " ".join(text.split()).removesuffix(".").strip()


def same_value(answer: str, said: str) -> bool:
    a, b = cleared(answer), cleared(said)
    if not a or not b:
        return False
    if a.casefold() == b.casefold():
        return True
    numbers = number(a), number(b)
    if numbers[0] is not None and numbers[1] is not None:
        return same_number(numbers[0], numbers[1])
    if is_words(a) or is_words(b):
        return False
    return same_expression(answer, said)


def is_words(text: str) -> bool:
    """Words, no product of variables."""
    return re.search(r"(?<![\\a-z])[a-z]{3,}", text, re.I) is not None and "\\" not in text


def same_expression(answer: str, said: str) -> bool:
    """By math-verify (Apache-2.0): intervals, sets, tuples, matrices, roots, polynomials."""
    library: Any = import_module("math_verify")  # of the extra lm-eval; half a second
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # no LaTeX is no fault of ours
    latex = [library.LatexExtractionConfig()]
    texts = [f"${text.strip().strip('$')}$" for text in (answer, said)]
    a, b = (library.parse(text, latex, parsing_timeout=LIMIT_S) for text in texts)
    if a and b and is_decimal(a[0]) != is_decimal(b[0]):
        numbers = real(a[0]), real(b[0])
        if numbers[0] is not None and numbers[1] is not None:
            return is_close(numbers[0], numbers[1])
    return bool(library.verify(a, b, timeout_seconds=LIMIT_S))


def is_decimal(value: Any) -> bool:
    from sympy import Float

    return isinstance(value, Float)


def real(value: Any) -> Fraction | None:
    """None for what is no real number: a set, an equation, a text, a variable."""
    try:
        return Fraction(float(value))
    except (TypeError, ValueError, OverflowError):
        return None
