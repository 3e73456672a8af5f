"""A run that keeps a domain out, by the command's own way: what it trains on, what it refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from run_helpers import train
from slm.errors import UserError
from slm.store.files import read_json
from slm.store.windows import open_windows
from train_helpers import compose_train, crash_at, same_results

FORGET = ("selection=forget", "selection.select_ratio=null", "selection.smooth=0")


@pytest.fixture
def pair(tmp_path, text_corpus, make_references) -> str:
    """A general reference of 2 nats a token; the domain's is ahead by 1 on every fourth."""
    domain = [np.where(np.arange(n) % 4, -2.0, -1.0) for n in text_corpus.shards.num_tokens]
    general = [np.full(len(one), -2.0) for one in domain]
    stores = [
        make_references(tmp_path / name, text_corpus, scores).folder
        for name, scores in (("general", general), ("domain", domain))
    ]
    return ",".join(f"'{one}'" for one in stores)


def composed_with(pair: str, folder: Path, corpus: Path, *more: str):
    words = (*FORGET, f"data.references=[{pair}]", "data.combine=domain", *more)
    return compose_train(folder, corpus, *words)


def kept(folder: Path) -> list[float]:
    with open(folder / "train.csv", newline="") as file:
        return [float(row["slm/kept_frac"]) for row in csv.DictReader(file)]


def test_a_run_with_replaced_inputs_resumes_exactly_and_is_a_model_of_one_row_more(
    tmp_path, text_corpus, pair, monkeypatch
):
    corpus, words = text_corpus.folder, ("selection.max_gain=0.5", "selection.mode=replace")
    whole, cut = (composed_with(pair, tmp_path / name, corpus, *words) for name in ("whole", "cut"))
    train(whole)
    crash_at(monkeypatch, 7)
    with pytest.raises(RuntimeError, match="crash"):
        train(cut)
    crash_at(monkeypatch, None)
    train(cut)
    same_results(tmp_path / "whole", tmp_path / "cut")
    assert kept(tmp_path / "whole") == pytest.approx([0.75] * 12)
    weights = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert len(weights["model.embed_tokens.weight"]) == text_corpus.vocab_size + 1
    masked = composed_with(pair, tmp_path / "masked", corpus, *words[:1])
    train(masked)
    assert kept(tmp_path / "masked") == pytest.approx([0.75] * 12)
    assert (tmp_path / "masked" / "train.csv").read_text() != (
        tmp_path / "whole" / "train.csv"
    ).read_text()
    record = read_json(tmp_path / "masked" / "run.json")
    assert record["data.combine"] == "domain" and "selection.min_gain" not in record


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["selection.max_gain=-1"], r"forget max_gain = -1 kept no token in 12 steps"),
        (["data.combine=mean"], r"needs data.references=\[GENERAL,DOMAIN\] with .* 'mean'"),
        (["selection.mode=replace", "trainer=fsdp"], "mode is 'replace', .* trainer=fsdp reads"),
    ],
)
def test_what_it_refuses(tmp_path, text_corpus, pair, words, message):
    corpus = text_corpus.folder
    config = composed_with(pair, tmp_path / "run", corpus, "+selection.max_gain=0.5", *words)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (tmp_path / "run" / "model").exists()


def test_long_gain_needs_a_short_context(tmp_path, text_corpus, pair):
    folder = pair.split(",")[0]
    words = ("selection=long_gain", f"data.references={folder}")
    with pytest.raises(UserError, match="long_gain needs scores of a short context .*general has"):
        train(compose_train(tmp_path / "run", text_corpus.folder, *words))


def test_s_ranks_a_domain_ahead_of_what_both_know(text_corpus, pair):
    """The columns are the two references', in the order in which they are named."""
    folders = [name.strip("'") for name in pair.split(",")]
    batch = open_windows(text_corpus, folders, "domain").batch(np.array([0]))
    gain = batch["domain_logprob"] - batch["reference_logprob"]
    assert gain[0].tolist() == [float(i % 4 == 0) for i in range(1, 17)]
