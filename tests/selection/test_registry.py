"""Rules by word: nothing that a folder says is imported, called or believed unseen."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf

from page_helpers import make_analysis, prose
from run_helpers import make_run
from slm.errors import UserError
from slm.report import __main__ as report
from slm.selection import Excess, Random
from slm.selection.registry import (
    OURS,
    RULES,
    by_word,
    import_modules,
    in_words,
    make_rule,
    takes_all_tokens,
    trained_word,
)
from slm.store.files import read_json, write_record

MARK = "from pathlib import Path\nPath(r'{mark}').touch()\ntouch = dict\n"
RULE = "from dataclasses import dataclass\nfrom slm.selection.rules import Excess\n\n\n"
RULE += "@dataclass(frozen=True)\nclass {name}(Excess):\n    extra: float = 0.0\n"
SCHEDULE = {"shape": "linear", "points": [[0, 1.0], [100, 0.5]]}
HOSTILE = [
    {"_target_": "marking.touch"},
    {"rule": "marking.touch"},
    {"_target_": "slm.selection.Excess", "select_ratio": {"_target_": "marking.touch"}},
    {"rule": "excess", "select_ratio": {"_target_": "marking.touch"}},
    {"rule": "excess", "select_ratio": 0.5, "scope": {"_target_": "marking.touch"}},
    {"rule": "excess", "select_ratio": SCHEDULE | {"points": [{"_target_": "marking.touch"}]}},
    {"rule": "excess", "select_ratio": 0.5, "_partial_": True},
    {"rule": "excess", "select_ratio": 0.5, "_args_": [{"_target_": "marking.touch"}]},
]


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The file that importing the module `marking` leaves."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "marking.py").write_text(MARK.format(mark=tmp_path / "mark"))
    monkeypatch.syspath_prepend(tmp_path / "path")
    return tmp_path / "mark"


@pytest.fixture
def write_rule(tmp_path):
    """write_rule(file, class) -> a module of one's own"""

    def write(file: str, name: str) -> str:
        (tmp_path / file).write_text(RULE.format(name=name))
        return str(tmp_path / file)

    yield write
    sys.modules.pop("mine_too", None)  # imported, and refused


def trained_in_words(selection: dict[str, Any]) -> dict[str, Any]:
    return in_words(selection, "selection", trained_word)


@pytest.mark.parametrize("selection", HOSTILE)
def test_what_a_folder_says_is_neither_imported_nor_called(mark, selection):
    with pytest.raises(UserError):
        make_rule(selection)
    assert not mark.exists() and "marking" not in sys.modules


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
def test_a_report_of_hostile_runs_runs_nothing_and_says_so(mark, tmp_path, call):
    folder = make_run(tmp_path / "run", "Excess", 0.5)
    for number, selection in enumerate(HOSTILE):
        plan = folder / "dynamics" / str(number) / "plan.json"
        make_analysis(plan.parent, prose(4, 9))
        body = read_json(plan)
        body["run"]["selection"] = selection
        write_record(plan, body)  # whoever makes a hostile folder makes its seals too
    identity = read_json(folder / "run.json")
    write_record(folder / "run.json", identity | {"selection._target_": "marking.touch"})
    code, _, err = call(report.main, f"runs='{folder}'", f"out='{tmp_path / 'out'}'")
    assert code == 0, err
    assert not mark.exists() and "marking" not in sys.modules
    assert err.count("nothing on what") == len(HOSTILE)


def test_every_configuration_of_a_rule_has_its_word_and_comes_back_from_it():
    configured = {path.stem for path in (Path("conf") / "selection").glob("*.yaml")}
    assert set(RULES) == configured
    made = make_rule({"rule": "random", "select_ratio": 0.25, "scope": "sequence", "seed": 3})
    assert made == Random(0.25, "sequence", seed=3)
    old = {"_target_": "slm.selection.Excess", "select_ratio": SCHEDULE, "scope": "batch"}
    assert make_rule(old) == Excess(SCHEDULE)
    assert make_rule(by_word(old) | {"rule": "mixture"}).ratio(50) == 0.75


def test_words_replace_paths_in_flat_records_and_in_nested_ones():
    flat = {
        "seed": 1,
        "selection._target_": "slm.selection.ReferenceLoss",
        "optimizer.adamw._target_": "slm.train.optim.adamw",
        "optimizer.adamw._partial_": True,
        "optimizer.adamw.lr": 0.1,
        "model._target_": "slm.model.build.build_lm",
        "model._convert_": "all",
    }
    assert in_words(flat) == {
        "seed": 1,
        "selection.rule": "reference_loss",
        "optimizer.adamw.kind": "adamw",
        "optimizer.adamw.lr": 0.1,
        "model.kind": "build_lm",
    }
    nested = {
        "optimizer": {"schedule": {"_target_": "mine.Linear", "_partial_": True, "x": [{"y": 2}]}},
        "callbacks": {
            "metrics": {"_target_": "slm.train.callbacks.metrics.Metrics", "kind": "its own"}
        },
    }
    assert in_words(nested) == {
        "optimizer": {"schedule": {"kind": "linear", "x": [{"y": 2}]}},
        "callbacks": {"metrics": {"kind": "its own"}},
    }
    assert in_words(in_words(flat)) == in_words(flat)


def test_what_rules_have_words():
    assert takes_all_tokens({"_target_": "slm.selection.All"}) and takes_all_tokens({"rule": "all"})
    assert takes_all_tokens({"rule": "random", "select_ratio": 1.0, "seed": 0, "scope": "batch"})
    assert not takes_all_tokens({"rule": "random", "select_ratio": 0.9, "scope": "batch"})


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"_target_": 3}, "_target_ is 3, it must be a class path"),
        ({"select_ratio": 0.5}, r"must name its rule, found \['select_ratio'\]"),
        ({"rule": "excess", "_target_": "slm.selection.All"}, "are both given"),
        ({"rule": "excess"}, r"selection.select_ratio is null, it must be a number in \(0, 1\]"),
        ({"rule": "sigmoid"}, "rule sigmoid cannot have the fields .*'temperature'"),
        (
            {"rule": "excess", "select_ratio": 2},
            r"select_ratio is 2, .*a number in \(0, 1\]",
        ),
        (
            {"rule": "random", "select_ratio": 0.5, "seed": "x"},
            "seed is 'x', it must be an integer",
        ),
        (
            {"rule": "unheard_of"},
            r"no rule 'unheard_of' is known here \(there are all, .*; modules=",
        ),
    ],
)
def test_a_rule_that_cannot_be_made_is_one_sentence(selection, message):
    with pytest.raises(UserError, match=message):
        make_rule(selection)


def test_anothers_class_does_not_pass_for_a_built_in_rule():
    selection = {"_target_": "mine.Excess", "select_ratio": 0.5}
    with pytest.raises(UserError, match="no rule 'mine.Excess' is known"):
        make_rule(selection)
    with pytest.raises(UserError, match="mine.Excess: a built-in has that name"):
        trained_in_words(selection)


@pytest.mark.parametrize(
    ("place", "word"), [(place, sorted(words)[0]) for place, words in OURS.items()]
)
def test_no_class_of_anothers_has_a_word_of_ours(place, word):
    """In old folders it keeps its path, so that the two are never taken for one."""
    assert in_words({f"{place}._target_": f"mine.{word}"}) != in_words(
        {f"{place}._target_": f"slm.x.{word}"}
    )
    with pytest.raises(UserError, match=f"{place}._target_ is mine.{word}: a built-in has that"):
        trained_word(f"mine.{word}", place)
    assert trained_word(f"slm.anywhere.{word}", place) == word


def test_the_words_of_the_configurations_are_ours():
    for place, words in OURS.items():
        group, _, node = place.partition(".")
        for path in (Path("conf") / group).glob("*.yaml"):
            tree: Any = OmegaConf.to_container(OmegaConf.load(path))
            node_of = tree[node] if node else tree
            if "_target_" in node_of:
                word = trained_word(node_of["_target_"], place)
                assert word in words and callable(get_method(node_of["_target_"]))


# ---- modules of a user's own --------------------------------------------------------------------


def test_a_rule_of_ones_own_has_a_word_once_its_module_is_given(write_rule):
    record = trained_in_words({"_target_": "own_rules.Steep", "select_ratio": 0.5, "extra": 2.0})
    assert record == {"rule": "steep", "select_ratio": 0.5, "extra": 2.0}
    with pytest.raises(UserError, match="no rule 'steep' is known here"):
        make_rule(record)
    file = write_rule("own_rules.py", "Steep")
    import_modules([file])
    import_modules([file])  # a sweep's jobs may share a process
    rule: Any = make_rule(record)
    assert type(rule).__name__ == "Steep" and asdict(rule)["extra"] == 2.0
    assert sys.modules["own_rules"].Steep is type(rule)  # what `_target_` finds
    assert trained_in_words({"_target_": "own_rules.Steep", "select_ratio": 0.5})["rule"] == "steep"
    for other in ("other.Steep", "own_rules.steep"):
        with pytest.raises(UserError, match=f"is {other}, and own_rules.Steep has its name"):
            trained_in_words({"_target_": other, "select_ratio": 0.5})


def test_modules_that_cannot_be_taken(write_rule, tmp_path):
    for given, message in [
        ([str(tmp_path / "none.py")], "no file .*none.py"),
        (["no_such.thing"], r"cannot import no_such.thing \(No module named 'no_such'\)"),
        ([write_rule("queue.py", "A")], "queue.py cannot be imported as queue, choose another"),
        ([write_rule("a-b.py", "A")], "a-b.py cannot be imported as a-b"),
        ([write_rule("mine_too.py", "Excess")], "mine_too.Excess has the name of another rule"),
    ]:
        with pytest.raises(UserError, match=message):
            import_modules(given)
