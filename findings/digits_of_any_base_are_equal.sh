#!/usr/bin/env bash
# math-verify compares answers as values, and MATH has answers in other bases, as 52_8. One would guess that this is 42, or at least no
# plain 52. The subscript is dropped when the text is parsed: 52_8 equals 52, 52_9 and 52_{10}, and does not equal 42. The digits alone count.
# Hurt: scores of the problems on bases are too high (the base is what they ask for), and a right answer in decimal is wrong.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-$work/venv/bin/python}
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/venv"
    "$python" -m pip install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
fi
cd "$work"
"$python" - <<'END'
import importlib.metadata, sys
from math_verify import parse, verify

def equal(answer, said):  # no limit of time: a busy machine would decide
    return verify(*(parse(f"${text}$", parsing_timeout=600) for text in (answer, said)), timeout_seconds=600)

print("math-verify", importlib.metadata.version("math-verify"))
found = {said: equal("52_8", said) for said in ("52_8", "52_9", "52_{10}", "52", "42")}
for said, same in found.items():
    print(f"the answer is 52_8, a model says {said}: {'equal' if same else 'unequal'}")
sys.exit(found != {"52_8": True, "52_9": True, "52_{10}": True, "52": True, "42": False})
END
