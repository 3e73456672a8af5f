"""Folders that a command names are opened first of all, and what fits goes on."""

from typing import Any

import pytest

from run_helpers import composed
from slm.cli import plain_settings
from slm.command_keys import SCORE
from slm.errors import UserError
from slm.store.inputs import check_command, check_inputs
from slm.train.keys import check_run


def settings_of(folder: str, *words: str) -> dict[str, Any]:
    given = (f"data.corpus={folder}", "out=x", "run_dir=x", "max_tokens=100_000", *words)
    return plain_settings(composed("train", *given))


def test_what_is_there_and_fits_is_no_mistake(text_corpus):
    folder = str(text_corpus.folder)
    check_inputs({"corpus": folder, "sets": {"a": folder}, "references": None, "runs": folder})
    check_run(settings_of(folder))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["data.heldout={a: /no/where}"],
            "^/no/where is not a finished corpus: it does not exist$",
        ),
        (["data.references=/no/where"], "^/no/where is not a finished reference: it does not"),
        (["model.init_from=/no/where"], "^model.init_from /no/where: there is no such folder"),
        (["online_reference=/no/where"], "^online_reference /no/where: there is no such folder"),
        (["max_tokens=1"], r"^max_tokens \(1\) is less than one optimizer step \(512 tokens\)"),
    ],
)
def test_what_is_not_there_is_said_of_each_key(text_corpus, words, said):
    settings = settings_of(str(text_corpus.folder), *words)
    with pytest.raises(UserError, match=said):
        check_run(settings)


def test_the_neighbours_of_a_corpus_that_is_not_there_are_named(text_corpus):
    folder = text_corpus.folder.parent / "heldout"
    settings = {"corpus": str(folder), "reference_model": "no", "out": "x"}
    there = rf"there is {text_corpus.folder} \(heldout_ratio=0 makes no heldout\)$"
    with pytest.raises(UserError, match=f"^{folder} is not a finished corpus: .*, {there}"):
        check_command(settings, SCORE)
