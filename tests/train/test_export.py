"""`slm export as=...`: a run's rule on its corpus; keys that do not go together."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

import slm
from model_helpers import small_llama
from slm.errors import UserError
from slm.model.folder import save_model
from slm.prepare.command import prepare
from slm.score.command import score
from slm.selection import Excess
from slm.store.files import write_record
from slm.store.shards import Corpus, References
from slm.store.tokenizer import load_corpus_tokenizer
from slm.store.windows import IGNORE_INDEX, Windows
from text_helpers import write_records

export_corpus = slm.export_corpus


class Made(NamedTuple):
    corpus: Corpus
    other: Corpus
    references: References
    run: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory, bytes_folder) -> Made:
    """A run whose rule ranks the tokens of each window, two models, two corpora."""
    folder = tmp_path_factory.mktemp("export")
    texts = [{"text": f"{n} and {n} make {2 * n}. \u4e2d\u6587 " * (1 + n % 3)} for n in range(30)]
    path = write_records(folder / "a.jsonl", *texts)
    settings: dict[str, Any] = {"seq_len": 16, "num_proc": 1, "tokenizer": {"path": bytes_folder}}
    both = prepare([str(path)], folder / "corpus", heldout_ratio=0.3, **settings)
    assert both.train is not None and both.heldout is not None
    tokenizer = load_corpus_tokenizer(both.train)
    for seed, name in enumerate(("reference", "run/model")):
        torch.manual_seed(seed)
        model = small_llama(both.train.vocab_size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
        save_model(folder / name, model, tokenizer, "card", {})
    references = score(
        both.train, folder / "refs", reference_model=folder / "reference", device="cpu"
    )
    assert isinstance(references, References)
    write_run(folder / "run", both.train, [references])
    return Made(both.train, both.heldout, references, folder / "run")


def write_run(folder: Path, corpus: Corpus, references: list[References], **more: Any) -> None:
    record: dict[str, Any] = {
        "corpus": corpus.fingerprint,
        "references": [store.fingerprint for store in references],
        "data.combine": None,
        "data.micro_batch_size": 4,
        "online_reference": None,
        "seed": 5,
        "max_tokens": 1000,
        "selection.rule": "excess",
        "selection.select_ratio": 0.5,
        "selection.scope": "sequence",
    }
    write_record(folder / "run.json", record | more)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_chooses_rows_documents_and_spans(made, tmp_path):
    """Rows by the rule on the windows, with losses of the model; one store for all three."""
    common = {"references": made.references, "run": made.run, "scores": tmp_path / "scores"}
    for form in ("rows", "documents", "spans"):
        export_corpus(made.corpus, out=tmp_path / form, form=form, device="cpu", **common)
    losses = score(made.corpus, tmp_path / "own", reference_model=made.run / "model", device="cpu")
    assert isinstance(losses, References)
    windows, own = Windows(made.corpus, [made.references]), Windows(made.corpus, [losses])
    every = range(len(windows))
    loss = -own.batch(every)["reference_logprob"]
    selected = Excess(0.5, "sequence").choose(windows.batch(every), loss, 0).selected
    targets = windows.batch(every)["targets"].masked_fill(~selected, IGNORE_INDEX)
    rows = pyarrow.parquet.read_table(tmp_path / "rows" / "rows.parquet").to_pydict()
    assert [row[1:] for row in rows["labels"]] == targets.tolist()
    # What a trainer of Hugging Face minimises: the mean over the labels.
    model = AutoModelForCausalLM.from_pretrained(made.run / "model")
    ids, labels = (torch.tensor(rows[name]) for name in ("input_ids", "labels"))
    found = model(input_ids=ids, labels=labels).loss.item()
    assert found == pytest.approx(loss[selected].mean().item(), rel=1e-4)
    said = json.loads((tmp_path / "rows" / "export.json").read_text())
    assert said["kept_tokens"] == said["of_kept_tokens"] == int(selected.sum())
    texts = lines(tmp_path / "documents" / "documents.jsonl")
    spans = lines(tmp_path / "spans" / "spans.jsonl")
    assert [{k: row[k] for k in texts[0]} for row in spans] == texts
    assert 0.4 < np.mean([row["share"] for row in texts]) < 0.6
    assert sorted(path.name for path in (tmp_path / "spans").iterdir()) == [
        "export.json",
        "spans.jsonl",
    ]


def test_the_highest_documents_by_hand_given_model_and_rule(made, tmp_path, caplog):
    """Without a run; what was scored stays, so that another threshold asks no model again."""
    keys: dict[str, Any] = {"target_model": made.run / "model", "references": made.references}
    keys |= {"keep": {"rule": "excess", "select_ratio": 0.3}, "form": "documents"}
    export_corpus(made.corpus, out=tmp_path / "every", **keys)
    every = lines(tmp_path / "every" / "documents.jsonl")
    scores = tmp_path / "every.scores"
    before = {path.name: path.stat().st_mtime_ns for path in scores.iterdir()}
    with caplog.at_level("INFO"):
        export_corpus(
            made.corpus, out=tmp_path / "some", by="excess", least=0, scores=scores, **keys
        )
    some = lines(tmp_path / "some" / "documents.jsonl")
    assert some == [row for row in every if row["excess"] >= 0] and 0 < len(some) < len(every)
    assert {path.name: path.stat().st_mtime_ns for path in scores.iterdir()} == before
    assert "documents and tokens that are not there any more" in caplog.text


EXCESS = {"rule": "excess", "select_ratio": 0.5}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "exactly one of format and as must be set, found null, null"),
        ({"format": "olmo", "form": "rows"}, "exactly one of format and as must be set"),
        ({"format": "olmo", "run": "x"}, "run is given, and format=olmo writes the whole corpus"),
        ({"format": "olmo", "least": 0}, "least is given, and format=olmo writes the whole corpus"),
        ({"form": "rows", "run": "x", "by": "share"}, "by is given, and as=rows writes every"),
        ({"form": "rows", "run": "x", "keep": EXCESS}, "keep and run are both given"),
        ({"form": "rows", "target_model": "x", "keep": "excess"}, "keep is 'excess', it must be a"),
        ({"form": "rows", "keep": EXCESS}, "as=rows needs run, or both target_model and keep"),
        ({"form": "spans", "run": "x", "by": "excess"}, "by=excess needs references"),
        ({"form": "rows", "run": "x"}, "x is no finished run of slm train"),
        ({"form": "sentences"}, "form is 'sentences', it must be one of"),
    ],
)
def test_keys_that_do_not_go_together(made, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        export_corpus(made.corpus, out=tmp_path / "out", **keys)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_the_runs_is_refused(made, tmp_path):
    keys: dict[str, Any] = {"form": "rows", "run": made.run, "references": made.references}
    with pytest.raises(UserError, match=f"corpus is '{made.corpus.fingerprint}' in the run, "):
        export_corpus(made.other, out=tmp_path / "out", form="rows", run=made.run)
    with pytest.raises(UserError, match=r"by their fingerprints, \w{64}, .* references=FOLDER"):
        export_corpus(made.corpus, out=tmp_path / "out", form="rows", run=made.run)
    with pytest.raises(UserError, match="out is null"):
        export_corpus(made.corpus, **keys)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; choose another"):
        export_corpus(made.corpus, out=tmp_path / "out", **keys)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"rule": "softmax", "temperature": 1.0}, "softmax, which weighs tokens and leaves none"),
        ({"rule": "excess", "select_ratio": 1}, "every document has a share of 1: .*by=excess"),
        ({"rule": "all"}, "all tokens, so that every document has a share of 1"),
        ({"rule": "reference_entropy", "select_ratio": 0.5}, "needs reference_entropy, and refer"),
    ],
)
def test_rules_that_rank_no_documents_are_refused(made, tmp_path, keep, message):
    keys = {"target_model": made.run / "model", "references": made.references}
    with pytest.raises(UserError, match=message):
        export_corpus(
            made.corpus, out=tmp_path / "out", form="documents", keep=keep, least=0.1, **keys
        )
    assert list(tmp_path.iterdir()) == []
