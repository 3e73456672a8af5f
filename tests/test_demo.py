"""The demo's text and its split; the stages run whole in CI, at a small scale."""

import ast
import csv
import json
from typing import Any

import pytest

import warm
from common import SKETCHED
from run_helpers import with_tiny_model
from slm import demo
from slm.demo import docstrings, is_heldout, quoted, source_files, statements


def test_docstrings_of_modules_classes_and_functions_with_their_names():
    long = "explains what happens at some length, so that it is worth reading by a model"
    source = (
        f'"""{long} 1"""\nclass A:\n    """{long} 2"""\n    def f(self):\n        """{long} 3"""\n'
    )
    found = list(docstrings("pkg/mod.py", source))
    assert found == [f"pkg.mod\n\n{long} 1", f"pkg.mod.A\n\n{long} 2", f"pkg.mod.f\n\n{long} 3"]
    assert list(docstrings("x.py", "def broken(:\n")) == []
    assert list(docstrings("x.py", 'def f():\n    """short"""\n')) == []


def test_statements_are_what_a_walk_through_the_whole_tree_finds():
    path = dict(source_files())["asyncio/base_events.py"]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.Module | ast.stmt | ast.ExceptHandler | ast.match_case
    walked = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert list(statements(tree)) == walked


def test_topics_of_the_language_reference():
    text = "The assert statement. " * 20
    assert list(docstrings("pydoc_data/topics.py", f"topics = {{'assert': {text!r}}}")) == [text]


def test_a_module_is_held_out_whole():
    names = [name for name, _ in source_files()]
    assert not [name for name in names if "/test/" in f"/{name}" or "site-packages" in name]
    sides: dict[str, set[bool]] = {}
    for name in names:
        sides.setdefault(name.split("/")[0].removesuffix(".py"), set()).add(is_heldout(name))
    assert all(len(side) == 1 for side in sides.values())
    share = sum(True in side for side in sides.values()) / len(sides)
    assert 0.05 < share < 0.25


@pytest.mark.slow
def test_no_held_out_module_is_in_the_training_text(tmp_path):
    demo.write_texts(tmp_path)
    names = {}
    for kind in ("raw", "curated", "heldout_raw", "heldout"):
        lines = (tmp_path / f"{kind}.jsonl").read_text().splitlines()
        names[kind] = {json.loads(line)["name"] for line in lines}
    for kind in ("heldout_raw", "heldout"):
        assert names[kind] and all(is_heldout(name) for name in names[kind])
    size = (tmp_path / "heldout_raw.jsonl").stat().st_size
    assert 200_000 < size < 1_000_000
    assert not [name for name in names["raw"] | names["curated"] if is_heldout(name)]
    assert "pydoc_data/topics.py" not in names["raw"]  # it is the curated text, word for word


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("demo/runs-1/a.b_c", "demo/runs-1/a.b_c"),
        ("a b,c=d", '"a b,c=d"'),
        ('say "x"\\', '"say \\"x\\"\\\\"'),
    ],
)
def test_quoted_is_read_back_by_hydra(path, expected):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert quoted(path) == expected
    assert OverridesParser.create().parse_override(f"out={quoted(path)}").value() == path


def run_small(words: list[str]) -> Any:
    """A stage, in a fork."""
    return warm.run(with_tiny_model(words), after=SKETCHED)


@pytest.mark.slow
def test_the_whole_demo_runs_from_another_folder(cut_demo_texts, tmp_path, monkeypatch, call):
    cut_demo_texts(tmp_path / "a b,c=d" / "text", 60_000)
    monkeypatch.setattr(demo.subprocess, "run", run_small)
    monkeypatch.chdir(tmp_path)
    words = ['out="a b,c=d"', "base_tokens=1024", "target_tokens=1024", "seeds=2"]
    small = '"data.batch_size=8", "data.micro_batch_size=8", "data.heldout_windows=8"'
    more = [
        f'train=["logger=csv", {small}]',
        "seq_len=64",
        "vocab_size=512",
        "dynamics_targets=500",
    ]
    code, _, errors = call(demo.main, *words, *more)
    assert code == 0, errors
    out = tmp_path / "a b,c=d"
    with open(out / "results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == [
        "base, before",
        "reference model itself",
        "all tokens",
        "random 0.6",
        "excess 0.6",
        "all tokens, curated text mixed in",
    ]
    assert [row["num_seeds"] for row in rows.values()] == ["1", "1", "2", "2", "2", "2"]
    assert all(3 < float(row["loss_mean"]) < 7 for row in rows.values())
    runs = sorted(path.name for path in (out / "runs" / "excess").iterdir() if path.is_dir())
    assert runs == ["seed=0", "seed=1"]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    stores = sorted(out.glob("runs/*/seed=*/dynamics/tokens"))
    assert [store.parts[-4] for store in stores] == ["all"] * 2 + ["excess"] * 2 + ["random"] * 2
    page = (out / "report" / "report.html").read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("<")[0])
    assert [run["name"] for run in data["runs"]] == [
        f"{rule}, seed {seed}"
        for rule in ("all tokens", "random k = 0.6", "excess k = 0.6")
        for seed in (0, 1)
    ]
    assert data["sweep"]["ratios"] and (out / "report" / "figures").is_dir()
