"""Every row has a key in conf/, every key a row; what does not fit is refused first of all."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
from omegaconf import OmegaConf

from run_helpers import composed
from slm import command_keys
from slm.checks import ABSENT, Table, check
from slm.cli import COMMANDS, plain_settings
from slm.command_keys import FORWARD
from slm.errors import UserError
from slm.model.device import DTYPES

GIVEN = {  # what must be given; nothing of it is there
    "prepare": ["out=x", "sources=[no.jsonl]", "tokenizer.path=no"],
    "import": ["format=npy", "path=no", "out=x", "tokenizer.path=no"],
    "export": ["corpus=no", "format=olmo", "out=x"],
    "score": ["corpus=no", "reference_model=no", "out=x"],
    "bind": ["corpus=no", "scores=no", "out=x"],
    "evaluate": ["models={a: no}", "sets={b: no}"],
    "harness": ["models={a: no}", "problems=no"],
    "needle": ["models={a: no}", "sets={b: no}"],
    "speak": ["models={a: no}", "prompts=no.txt"],
    "annotate": ["sources=[no.jsonl]", "served_model=no", "requests=x"],
    "quality": ["labels=no", "out=x"],
    "dynamics": ["runs=no", "corpus=no"],
    "report": ["runs=no", "out=x"],
    "pilot": [
        *("corpus=no", "out=x", "reference_model=no", "model.init_from=no", "heldout={a: no}"),
    ],
    "pivots": ["target_model=no", "problems=no.jsonl", "out=x"],
    "dashboard": ["out=x"],
    "demo": ["out=x"],
    "consolidate": ["checkpoint=no", "out=x.ckpt"],
}

NO_CORPUS = "no is not a finished corpus: it does not exist"
NOT_THERE = dict.fromkeys(["score", "bind", "evaluate", "dynamics", "train", "pilot"], NO_CORPUS)
NOT_THERE |= {"harness": "models no: there is no such folder", "report": "no is no folder"}
NOT_THERE |= {"pivots": "target_model no: there is no such folder"}
NOT_THERE |= {"speak": "models no: there is no such folder"}
NOT_THERE |= {"prepare": "no tokenizer at no: there is no such folder"}

HEAVY = {"torch", "transformers", "lightning", "wandb", "datasets", "matplotlib"}


def table_of(name: str) -> Table:
    return getattr(command_keys, name.upper())


def test_every_command_with_a_configuration_has_a_table():
    assert GIVEN.keys() | {"train", "verify"} == COMMANDS.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_rows_are_the_keys_of_the_configuration_and_its_values_fit(name):
    config = composed(name, *GIVEN[name])
    table = table_of(name)
    check(config, table)  # or a key has no row
    assert ABSENT not in [OmegaConf.select(config, key, default=ABSENT) for key in table]


def test_words_of_a_forward_are_those_that_it_knows():
    assert all(FORWARD["dtype"].fits(name) for name in DTYPES)


@pytest.mark.parametrize(
    ("name", "word", "sentence"),
    [
        (
            "prepare",
            "seq_len=4.5",
            "seq_len is 4.5, it must be a whole number from 1 to",
        ),
        ("prepare", "shard_tokens=1e6", "shard_tokens is 1000000.0, .*, as in 1_000_000$"),
        ("prepare", "heldout_ratio=half", r"heldout_ratio is 'half', .* number in \[0, 1\]"),
        (
            "prepare",
            "tokenizer.vocab_size=big",
            "tokenizer.vocab_size is 'big', it must be",
        ),
        ("prepare", "+seqlen=4", "seqlen is given, and nothing reads it, did you mean seq_len?"),
        ("prepare", "+tokenizer.name=x", "tokenizer.name is given, and nothing reads it"),
        ("import", "format=arrow", "format is 'arrow', it must be one of .*'megatron'"),
        ("import", "tokenizer.path=null", "tokenizer.path is null, it must be a text"),
        ("score", "batch_size=true", "batch_size is True, it must be a whole number of at least 1"),
        ("score", "entropy=yes_please", "entropy is 'yes_please', it must be true or false"),
        (
            "score",
            "responses=[]",
            r"responses is \[\], it must be a text .*, or a list of at least",
        ),
        ("score", "check=deep", "check is 'deep', it must be one of .'size', 'full'"),
        ("score", "+model.name=x", "model.name is given, and nothing reads it"),
        ("score", "layout=rows", "layout is 'rows', it must be one of .'windows', 'documents'"),
        ("bind", "missing=no", "missing is 'no', it must be one of .'refuse', 'score', 'skip'"),
        ("evaluate", "dtype=float16", "dtype is 'float16', it must be one of .*'bf16-mixed'"),
        ("evaluate", "models={a: 3}", "models is {'a': 3}, it must be {name: folder, ...}"),
        ("evaluate", "max_windows=-1", "max_windows is -1, it must be a whole .*, or null"),
        ("harness", "limit=0.5", "limit is 0.5, it must be a whole number"),
        ("harness", "device=0", "device is 0, it must be a text"),
        ("needle", "depths=[0, 2]", r"depths is \[0, 2\], it must be a list of at least 1, each a"),
        ("needle", "pairs=1", "pairs is 1, it must be a whole number from 2 to 26"),
        ("evaluate", "by_position=64", "by_position is 64, it must be a list of at least 1"),
        ("speak", "prompts=3", "prompts is 3, it must be a text .*, or a list of sources"),
        (
            "annotate",
            "on_bad_answer=go",
            "on_bad_answer is 'go', it must be one of .'stop', 'skip'",
        ),
        ("quality", "threshold=6", r"threshold is 6, it must be a number in \[0, 5\]"),
        ("dynamics", "by_source=1", "by_source is 1, it must be true or false"),
        ("dynamics", "seed=-1", "seed is -1, it must be a whole number from 0 to 4294967295"),
        ("dynamics", "runs=[]", r"runs is \[\], it must be a text .*, or a list of at least 1"),
        ("report", "sets=math", "sets is 'math', it must be a list of at least 1"),
        ("report", "max_dynamics=few", "max_dynamics is 'few', it must be a whole number"),
        ("report", "baselines=[a]", r"baselines is \['a'\], it must be {name: folder, ...}"),
        ("pilot", "budget=0.01", "budget is 0.01, it must be a share of the corpus such as 1%"),
        ("pilot", "select_ratios=[0]", r"select_ratios is \[0\], .* at 0 nothing is trained on"),
        ("pilot", "select_ratios=[0.5,1]", "select_ratios is .*, and 1 is all tokens, an arm of"),
        ("pivots", "keep=[0.2]", r"keep is \[0.2\], it must be a list of 2, each a number in"),
        ("pivots", "temperature=0", "temperature is 0, it must be a number above 0"),
        ("dashboard", "save=1", "save is 1, it must be auto, true or false"),
        ("dashboard", "runs=[a]", r"runs is \['a'\], it must be a text"),
        ("demo", "seeds=0", "seeds is 0, it must be a whole number of at least 1"),
        ("demo", "target_tokens=1e5", "target_tokens is 100000.0, .*, as in 100_000$"),
        ("demo", "select_ratio=0", r"select_ratio is 0, it must be a number in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, monkeypatch, name, word, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        door_of(name).__wrapped__(**plain_settings(composed(name, *GIVEN[name], word)))
    assert re.match(sentence, str(refused.value)) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", GIVEN)
def test_the_command_says_it(call, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(door_of(name), *GIVEN[name], "+seqlen=4")
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"slm {name}: seqlen is given, and nothing reads it"), err
    assert list(tmp_path.iterdir()) == []


MISTYPED = f"""
import sys
from importlib import import_module
for name, home, words in {{commands}}:
    sys.argv = [f"slm {{name}}", *words]
    try:
        import_module(home).main()
    except SystemExit as ended:
        assert ended.code == 1
    assert not {HEAVY} & set(sys.modules), (name, {HEAVY} & set(sys.modules))
"""


@pytest.mark.slow
def test_a_mistake_in_a_key_does_not_wait_for_heavy_imports(tmp_path):
    doors = [(name, door_of(name).__module__, words) for name, words in GIVEN.items()]
    doors.append(("train", "slm.train.__main__", ["data.corpus=no", "max_tokens=1", "out=x"]))
    commands = [(name, home, [*words, "+ouut=1"]) for name, home, words in doors]
    commands.append(("train", "slm.train.__main__", ["ouut=1"]))
    commands += [door for door in doors if door[0] in NOT_THERE]
    code = MISTYPED.replace("{commands}", repr(commands))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = dict(zip(map(repr, commands), done.stderr.splitlines(), strict=True))
    for name, _, words in commands:
        said = f"{name}: ouut is given, and nothing reads it"
        if words == ["ouut=1"]:
            said = "train: no key 'ouut', did you mean out? (`slm train --help` lists them)"
        elif words[-1] != "+ouut=1":
            said = f"{name}: {NOT_THERE[name]}"
        assert lines.pop(repr((name, _, words))).startswith(f"slm {said}")


def door_of(name: str) -> Any:
    is_folder = find_spec(f"slm.{name}").submodule_search_locations  # type: ignore[union-attr]
    return import_module(f"slm.{name}.__main__" if is_folder else f"slm.{name}").main
