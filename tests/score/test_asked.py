"""What does not go together is one sentence, before anything is read."""

from typing import Any

import pytest

from slm.errors import UserError
from slm.score.asked import check_way

ASKED = {
    "reference_model": "m",
    "requests": None,
    "responses": None,
    "served_model": None,
    "out": "o",
    "layout": "windows",
    "context": None,
    "stride": None,
    "max_tokens": None,
    "more": [],
    "direct": False,
    "tp_size": 1,
    "fsdp_size": 1,
    "scores": "transformers",
}


def asked(*, of: str = "reference_model", **changes: Any) -> dict[str, Any]:
    one = {"reference_model": None, of: "m"}
    served = {} if of == "reference_model" else {"served_model": "x"}
    return ASKED | one | served | changes


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (asked(reference_model=None), "one of .* must be given, found none"),
        (asked(requests="r"), "must be given, found reference_model and requests"),
        (asked(of="responses", served_model=None), "served_model must be given with responses"),
        (asked(out=None), "out must be given with reference_model"),
        (asked(served_model="x"), "served_model is 'x', but reference_model does not use it"),
        (asked(of="requests"), "out is 'o', but requests does not use it"),
        (asked(of="responses", more=["entropy"]), "entropy cannot be had with responses"),
        (asked(of="responses", max_tokens=5), "max_tokens is 5, but responses goes by whole"),
        (asked(of="responses", tp_size=2), "tp_size is 2, but it is for windows that a ref"),
        (asked(of="requests", out=None, direct=True), "direct is true, but it is for windows"),
        (asked(fsdp_size=2, layout="documents"), "fsdp_size is 2, but it is for windows"),
        (asked(tp_size=2, fsdp_size=2), "tp_size is 2 and fsdp_size is 2: processes hold a"),
        (asked(scores="vllm", fsdp_size=2), "scores is 'vllm', which gives log-probs alone"),
        (asked(scores="vllm", more=["entropy"]), "scores is 'vllm', which gives log-probs alone"),
        (asked(scores="vllm", layout="documents"), "but layout=documents is scored by trans"),
        (asked(layout="documents", max_tokens=7), "max_tokens is 7, but layout=documents stores"),
        (asked(layout="documents", more=["entropy"]), "columns is entropy, but layout=documents"),
        (asked(of="requests", out=None, layout="documents"), "layout=documents needs a reference"),
    ],
)
def test_what_does_not_go_together(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        check_way(settings)


@pytest.mark.parametrize(
    "settings",
    [
        asked(),
        asked(of="requests", out=None),
        asked(of="responses"),
        asked(layout="documents", context=512, stride=128),
        asked(direct=True, tp_size=2),
        asked(fsdp_size=4, more=["entropy"], max_tokens=9),
        asked(scores="vllm", tp_size=2),
    ],
)
def test_what_goes_together(settings):
    check_way(settings)
