"""Text to evaluation as a person would run it: the commands, one after the other, on real text."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import warm
from dynamics_helpers import compose_dynamics, during
from run_helpers import compose_report, composed, train
from slm.cli import plain_settings
from slm.dynamics.command import dynamics
from slm.report.command import report
from slm.score.command import score
from slm.store.shards import Corpus, References
from slm.store.windows import Windows
from text_helpers import DATA, needs_data
from train_helpers import compose_train

TINY = ["experiment=smoke", "logger=csv", "data.batch_size=8", "data.micro_batch_size=4"]


def slm(folder: Path, *words: str) -> str:
    done = warm.run(
        [sys.executable, "-m", f"slm.{words[0]}", *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@needs_data
def test_text_to_evaluation(tmp_path):
    raw = f"{{path: '{DATA}/raw/aqua_*.jsonl', text: \"{{question}}\\n{{rationale}}\"}}"
    curated = f"{{path: '{DATA}/curated/gsm8k_train.jsonl', text: \"{{question}}\\n{{answer}}\""
    curated += ", weight: 0.05}"
    common = ("seq_len=64", "heldout_ratio=0.1")
    slm(tmp_path, "prepare", "out=raw", f"sources=[{raw}]", "tokenizer.vocab_size=512", *common)
    shared = "tokenizer.path=raw/train/tokenizer"
    slm(tmp_path, "prepare", "out=curated", f"sources=[{curated}]", shared, *common)
    train = ("train", *TINY, "max_tokens=8_192")
    heldout = ("data.heldout={gsm: curated/heldout}", "callbacks.heldout.every_tokens=4_096")
    slm(tmp_path, *train, "out=base", "data.corpus=raw/train", "selection=all")
    base = "model.init_from=base/model"
    slm(tmp_path, *train, "out=reference", "data.corpus=curated/train", "selection=all", base)
    reference = "reference_model=reference/model"
    slm(tmp_path, "score", "out=refs", "corpus=raw/train", reference)
    check_scores(tmp_path)
    words = ("out=slm", "data.corpus=raw/train", "data.references=refs", "selection=excess")
    slm(tmp_path, *train, *words, base, *heldout)
    slm(tmp_path, "evaluate", "models={slm: slm/model}", "sets={gsm: curated/heldout}", "out=e.csv")
    check_evaluation(tmp_path)
    report = slm(tmp_path, "verify", "raw", "curated", "refs", "slm")
    assert "NOT WHOLE" not in report and report.count("whole: ") >= 6
    lineage = json.loads((tmp_path / "slm" / "lineage.json").read_text())
    assert lineage["references"][0]["fingerprint"] == References.open(tmp_path / "refs").fingerprint


def check_scores(folder: Path) -> None:
    """Stored log-probs equal log_softmax of the reference model's own logits."""
    corpus, references = Corpus.open(folder / "raw/train"), References.open(folder / "refs")
    model = AutoModelForCausalLM.from_pretrained(folder / "reference" / "model")
    batch = Windows(corpus, [references]).batch(np.array([0, len(Windows(corpus)) - 1]))
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits.double()
    expected = F.log_softmax(logits, -1).gather(-1, batch["targets"][..., None])[..., 0]
    torch.testing.assert_close(batch["reference_logprob"].double(), expected, rtol=1e-5, atol=1e-5)


def check_evaluation(folder: Path) -> None:
    """The CSV's loss equals cross-entropy of the model's logits over all windows, in float64."""
    corpus = Corpus.open(folder / "curated" / "heldout")
    model = AutoModelForCausalLM.from_pretrained(folder / "slm" / "model")
    windows = Windows(corpus)
    nats = []
    with torch.no_grad():
        for part in np.array_split(np.arange(len(windows)), max(1, len(windows) // 32)):
            batch = windows.batch(part)
            logits = model(batch["input_ids"]).logits.double().flatten(0, 1)
            nats.append(F.cross_entropy(logits, batch["targets"].flatten(), reduction="none"))
    with open(folder / "e.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss"]) == pytest.approx(torch.cat(nats).mean().item(), rel=1e-6)
    with open(folder / "slm" / "heldout.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert len(windows) <= 256  # what training evaluates at most
    assert float(last["heldout/gsm/loss"]) == pytest.approx(float(row["loss"]), rel=1e-6)


CLASS = re.compile(
    r"_target_|slm\.[a-z_.]+\.[A-Za-z]|lightning\.|torch\.[a-z_]+\.|transformers\.[a-z]"
)


def test_nothing_that_is_written_names_a_class(tmp_path, text_corpus):
    """Classes may move, and a folder from anybody has nothing to import or call."""
    corpus, keep = text_corpus.folder, "callbacks.checkpoints.keep=null"
    train(compose_train(tmp_path / "first", corpus, "selection=all"))
    model, scores = tmp_path / "first" / "model", tmp_path / "scores"
    named = [f"corpus='{corpus}'", f"reference_model='{model}'", f"out='{scores}'"]
    score(**plain_settings(composed("score", *named)))
    words = ("selection=excess", f"data.references='{scores}'", keep)
    train(compose_train(tmp_path / "run", corpus, *words, *during(text_corpus)))
    dynamics(**compose_dynamics(tmp_path / "run", corpus))
    report(**compose_report([tmp_path / "first", tmp_path / "run"], tmp_path / "report"))
    files = [path for end in ("json", "csv") for path in sorted(tmp_path.rglob(f"*.{end}"))]
    assert len(files) > 40
    found = {str(path.relative_to(tmp_path)): CLASS.findall(path.read_text()) for path in files}
    assert {name: names for name, names in found.items() if names} == {}
