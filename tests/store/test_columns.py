"""A column is an entry: a third one, of these tests alone, goes wherever the first two go."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from slm.dynamics.analysis import as_batch
from slm.dynamics.token_set import read_token_set, read_windows, write_token_set
from slm.errors import UserError
from slm.integrations.datasets import WindowDataset, from_hf_dataset, to_hf_dataset
from slm.model.build import SelectiveLM
from slm.model.predict import predicted
from slm.score.command import ModelScores, make_plan
from slm.score.scorer import Scorer, finish
from slm.selection.rules import Ranked
from slm.store.columns import COLUMNS, ENTROPY, LOGPROBS, Column, columns_named, columns_needed
from slm.store.files import write_array, write_json
from slm.store.shards import Corpus, References, write_manifest
from slm.store.sidecars import write_sidecar
from slm.store.windows import IGNORE_INDEX, Windows
from slm.verify import verify


def margin(output: Any, batch: Any, lm: Any) -> torch.Tensor:
    """How far the token is behind the model's first guess, nats."""
    logits = lm.model(batch["input_ids"]).logits.float().log_softmax(-1)
    return logits.max(-1).values + output.loss


MARGIN = Column("margin", "reference_margin", "margin", 1, margin)


@pytest.fixture
def third(monkeypatch) -> Column:
    monkeypatch.setitem(COLUMNS, MARGIN.name, MARGIN)
    return MARGIN


@pytest.fixture
def lm() -> SelectiveLM:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, num_attention_heads=2, num_key_value_heads=2, **sizes)
    return SelectiveLM(LlamaForCausalLM(config)).eval()


def made_here() -> list[str]:
    return [column.name for column in COLUMNS.values() if column.produce is not None]


@pytest.fixture
def scored(third, tmp_path, text_corpus, lm) -> References:
    """Every column that there is."""
    out = tmp_path / "references"
    out.mkdir()
    write_json(out / "plan.json", make_plan(text_corpus, None, {}))
    scorer = Scorer(
        ModelScores(lm, Windows(text_corpus), made_here()), text_corpus, out, 8, "float32"
    )
    scorer.run(lambda count: None)
    finish(scorer)
    return References.open(out, "full")


@dataclass(frozen=True)
class NearMiss(Ranked):
    """The smallest margin."""

    needs = (MARGIN.key,)

    def score(self, batch: Any, token_loss: Any) -> torch.Tensor:
        return -batch[MARGIN.key]


def by_hand(lm: SelectiveLM, windows: Windows) -> np.ndarray:  # (W, T)
    batch = windows.batch(np.arange(len(windows)))
    with torch.no_grad():
        logits = lm.model(batch["input_ids"]).logits.double()
    own = logits.gather(-1, batch["targets"][..., None])[..., 0]
    return (logits.max(-1).values - own).numpy()


def test_it_is_scored_and_batched(scored, text_corpus, lm):
    windows = Windows(text_corpus, [scored])
    batch = windows.batch(np.arange(len(windows)))
    np.testing.assert_allclose(batch[MARGIN.key].numpy(), by_hand(lm, windows), atol=1e-5)
    assert batch[MARGIN.key].dtype == torch.float32
    assert [column.name for column in windows.columns] == ["logprobs", "entropy", "margin"]
    assert [c.name for c in Windows(text_corpus, [scored, scored], "mean").columns] == ["logprobs"]


def test_an_online_reference_has_what_a_rule_needs(third, text_corpus, lm):
    windows = Windows(text_corpus)
    columns = columns_needed(NearMiss(0.5).needs)
    assert columns == (LOGPROBS, third)
    batch = windows.batch(np.arange(len(windows)))
    batch["targets"] = batch["targets"].clone()
    batch["targets"][0, :3] = IGNORE_INDEX
    found = predicted(lm, batch, columns)
    assert found.keys() == {"reference_logprob", "reference_margin"}
    assert found[third.key].isnan().nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


def rewrite(store: References, column: str, place: int, value: float) -> Path:
    """One value of the first shard, under hashes that fit it."""
    shard, path = store.shards[0], store.shards[0].path(store.folder, column)
    values = np.load(path)
    values[place] = value
    hashes = shard.sha256 | {column: write_array(path, values)}
    write_sidecar(store.folder, LOGPROBS.name, replace(shard, sha256=hashes))
    write_manifest(store.folder, LOGPROBS.name, len(store.shards))
    return path


@pytest.mark.parametrize("value", [-0.5, float("inf"), float("nan")])
def test_a_wrong_value_is_named_with_its_file_and_refused_in_a_batch(scored, text_corpus, value):
    ((_, whole, _),) = verify(scored.folder)
    assert whole
    path = rewrite(scored, "margin", 5, value)
    ((_, whole, text),) = verify(scored.folder)
    assert not whole
    assert f"{path}: entry 5 has margin {value}, a finite number >= 0 is needed" in text
    windows = Windows(text_corpus, [References.open(scored.folder)])
    with pytest.raises(UserError, match=f"target 4 of window 0 has margin {value}, a finite"):
        windows.batch(np.array([0]))


def test_a_model_that_gives_a_wrong_value_is_refused(third, monkeypatch, text_corpus, lm):
    wrong = replace(third, produce=lambda output, batch, lm: -output.loss)
    monkeypatch.setitem(COLUMNS, third.name, wrong)
    source = ModelScores(lm, Windows(text_corpus), ["margin"])
    with pytest.raises(
        UserError, match=r"gives target 0 of window 0 margin -\d.*, a finite .* >= 0"
    ):
        source.scores(np.arange(2))


def test_a_column_that_nobody_knows_is_none(scored, monkeypatch):
    monkeypatch.delitem(COLUMNS, "margin")
    ((_, whole, text),) = verify(scored.folder)
    assert not whole and "margin-00000.npy: a column of a reference is one of" in text
    for name in ("margin", "domain"):  # the latter is another reference's
        message = rf"columns names \['{name}'\], known are \['entropy', 'logprobs'\]"
        with pytest.raises(UserError, match=message):
            columns_named([name])


def test_a_token_set_holds_it_and_rules_rank_by_it(scored, text_corpus, tokenizer, tmp_path):
    windows, numbers = Windows(text_corpus, [scored]), np.array([1, 4, 30])
    (tmp_path / "set").mkdir()
    write_token_set(tmp_path / "set", read_windows(windows, numbers, tokenizer))
    frozen, expected = as_batch(read_token_set(tmp_path / "set")), windows.batch(numbers)
    for column in windows.columns:
        torch.testing.assert_close(frozen[column.key], expected[column.key], rtol=0, atol=0)
    rule = NearMiss(0.5, scope="sequence")
    chosen = (rule.choose(batch, None, 0).selected for batch in (frozen, expected))
    assert torch.equal(*chosen)


def test_rows_of_datasets_have_it(scored, text_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = to_hf_dataset(text_corpus.folder, scored.folder)
    batch = Windows(text_corpus, [scored]).batch(np.arange(len(rows)))
    item = WindowDataset(text_corpus.folder, scored.folder)[3]
    for column in map(COLUMNS.__getitem__, made_here()):
        found = np.array(rows[column.key], np.float32)[:, 1:]
        np.testing.assert_array_equal(found, batch[column.key].numpy())
        assert torch.equal(item[column.key], batch[column.key][3])


def test_rows_of_datasets_give_it_back(third, text_corpus, tmp_path):
    values = {"reference_logprob": [-1.0, -2.0, -3.0], third.key: [1.0, 0.0, 4.0]}
    rows = {name: [column] * 2 for name, column in ({"input_ids": [5, 6, 7]} | values).items()}
    tokenizer = text_corpus.tokenizer_folder
    out = from_hf_dataset(Dataset.from_dict(rows), tmp_path / "out", tokenizer)
    windows = Windows(Corpus.open(out / "train"), [References.open(out / "references", "full")])
    batch = windows.batch(np.arange(2))
    np.testing.assert_array_equal(batch[third.key], [[0, 4, np.nan]] * 2)
    assert all(whole for _, whole, _ in verify(out))
    message = r"row 0: reference_margin\[2\] is -4.0 under the label 7, a finite number >= 0"
    with pytest.raises(ValueError, match=message):
        wrong = Dataset.from_dict(rows | {third.key: [[1.0, 0.0, -4.0]] * 2})
        from_hf_dataset(wrong, tmp_path / "wrong", tokenizer)
    with pytest.raises(ValueError, match="reference_margin and no reference_logprob"):
        alone: Any = Dataset.from_dict(rows).remove_columns("reference_logprob")
        from_hf_dataset(alone, tmp_path / "alone", tokenizer)


def test_what_a_store_has_is_what_every_store_has_and_what_is_asked_for():
    assert columns_named([]) == (LOGPROBS,)
    assert columns_named(["entropy"]) == columns_named(["logprobs", "entropy"])
    assert columns_needed([]) == columns_needed(["reference_logprob"]) == (LOGPROBS,)
    assert columns_needed(["reference_entropy"]) == (LOGPROBS, ENTROPY)
