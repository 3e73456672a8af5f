"""What a notebook imports from `slm`: light, the same keys as the command line, results to use."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import slm
from model_helpers import small_llama
from slm.cli import conf_folder
from slm.dynamics.command import dynamics
from slm.errors import UserError
from slm.evaluate.command import evaluate
from slm.evaluate.harness import harness
from slm.evaluate.needle import needle
from slm.evaluate.speak import speak
from slm.model.folder import save_model
from slm.pivots.command import pivots
from slm.prepare.command import prepare
from slm.prepare.imports.command import import_corpus
from slm.quality.annotate import annotate
from slm.quality.command import quality
from slm.report.command import report
from slm.report.workspace import dashboard
from slm.score.bind import bind_scores
from slm.score.command import score
from slm.stage import complete
from slm.store.shards import Corpus, References
from slm.store.tokenizer import load_corpus_tokenizer
from slm.train.consolidate import consolidate_checkpoint
from slm.train.export import export_corpus

STAGES: dict[str, Callable[..., Any]] = {
    "prepare": prepare,
    "import": import_corpus,
    "export": export_corpus,
    "score": score,
    "bind": bind_scores,
    "consolidate": consolidate_checkpoint,
    "evaluate": evaluate,
    "harness": harness,
    "needle": needle,
    "speak": speak,
    "annotate": annotate,
    "quality": quality,
    "dynamics": dynamics,
    "pivots": pivots,
    "report": report,
    "dashboard": dashboard,
}


def test_the_import_is_light():
    code = "import slm, sys; from slm import evaluate, prepare, score, train\n"
    code += "print(*{'torch', 'numpy', 'hydra', 'omegaconf', 'rich'} & set(sys.modules), dir(slm))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("['") and set(slm.__all__) <= set(slm.__dir__())


def test_every_public_name_is_there():
    assert slm.Corpus is Corpus and slm.References is References
    assert all(hasattr(slm, name) for name in slm.__all__)
    with pytest.raises(AttributeError, match="module 'slm' has no attribute 'nope'"):
        slm.nope  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", STAGES)
def test_parameters_and_defaults_are_the_keys_of_the_command(name: str):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        keys: Any = OmegaConf.to_container(compose(name))
    keys.pop("task", None)  # of the command's array
    if "as" in keys:  # a word of Python's
        keys["form"] = keys.pop("as")
    signature = inspect.signature(STAGES[name])
    required = {key for key, value in keys.items() if value == "???"}
    defaults = {key: value for key, value in keys.items() if key not in required}
    found = complete(signature, dict.fromkeys(required))
    assert {k for k, p in signature.parameters.items() if p.default is p.empty} == required
    assert {key: found[key] for key in found if key not in required} == defaults


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_is_explained(name: str):
    about = inspect.getdoc(STAGES[name])
    assert about is not None
    explained = [line.strip().partition(":")[0] for line in about.splitlines() if ": " in line]
    assert set(inspect.signature(STAGES[name]).parameters) <= set(explained)
    assert "Returns:\n" in about and "Raises:\n    UserError: " in about


def test_a_stage_is_its_folder_and_its_function():
    import slm.prepare.sources

    assert slm.prepare.sources.parse_sources([], "sources") == []  # type: ignore[attr-defined]
    package: Any = slm.prepare
    assert inspect.signature(package) == inspect.signature(prepare)
    assert package.__call__ is prepare
    with pytest.raises(UserError, match="seq_length is given, and nothing reads it, did you mean"):
        package(["a.jsonl"], "corpus", seq_length=8)


def test_from_text_to_losses(tmp_path: Path):
    texts = [{"text": f"{number} and {number} make {2 * number}. " * 4} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    made = slm.prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "corpus",
        tokenizer={"vocab_size": 270},
        seq_len=16,
        heldout_ratio=0.3,
        num_proc=1,
    )
    assert made.train is not None and made.heldout is not None
    assert made.report["train"]["windows"] == made.train.num_windows
    tokenizer = load_corpus_tokenizer(made.train)
    save_model(tmp_path / "model", small_llama(made.train.vocab_size), tokenizer, "card", {})
    references = slm.score(
        made.train, tmp_path / "refs", reference_model=tmp_path / "model", device="cpu"
    )
    assert isinstance(references, References)
    references.check_matches(made.train)
    rows = slm.evaluate(
        {"m": tmp_path / "model"}, {"held": made.heldout}, device="cpu", out=tmp_path / "t.csv"
    )
    frame = pandas.DataFrame(rows)
    assert list(frame["set"]) == ["held"] and frame["loss"].between(4, 7).all()
    assert pandas.read_csv(tmp_path / "t.csv").equals(frame)
