"""What scoring cost, and what is known of the model that scored."""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slm.model.build import SelectiveLM
from slm.model.device import device_name
from slm.model.folder import save_model
from slm.score import reference
from slm.score.cost import copy_lineage, reference_lineage, references_cost, write_cost
from slm.score.reference import ModelScores
from slm.score.scorer import Scorer
from slm.store.shards import References
from slm.store.windows import Windows


@pytest.fixture
def references(tmp_path, text_corpus, make_references) -> References:
    scores = [np.r_[np.nan, -np.ones(320)] for _ in range(2)]
    return make_references(tmp_path / "references", text_corpus, scores)


def record(seconds: float, device: str) -> dict[str, Any]:
    return {"seconds": seconds, "tokens": 320, "flops": 1e9, "device": device}


def test_shards_are_summed_and_a_missing_one_leaves_no_sum(references):
    assert references_cost(references.folder) is None
    write_cost(references.folder, 0, record(1.5, "b"))
    assert references_cost(references.folder) is None
    write_cost(references.folder, 1, record(0.25, "a"))
    assert references_cost(references.folder) == {
        "seconds": 1.75,
        "tokens": 640,
        "flops": 2e9,
        "devices": ["a", "b"],
    }
    assert References.open(references.folder, "full").fingerprint == references.fingerprint
    write_cost(references.folder, 1, record(0.25, "a") | {"flops": None})  # a mixture
    found = references_cost(references.folder)
    assert found is not None and found["flops"] is None and found["tokens"] == 640


def test_a_scored_shard_leaves_its_seconds_tokens_and_flops(tmp_path, text_corpus, monkeypatch):
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, **heads))
    source = ModelScores(SelectiveLM(model), Windows(text_corpus))
    checked, out = reference.checked, tmp_path / "out"
    out.mkdir()

    def slow(*batch: Any) -> Any:
        time.sleep(0.05)
        return checked(*batch)

    monkeypatch.setattr(reference, "checked", slow)
    Scorer(source, text_corpus, out, 10, "float32").run(lambda count: None)
    # Per layer q 8x8, k and v 8x4, o 8x8, three MLP matrices 8x12, two norms; the last norm.
    body = 2 * (64 + 2 * 32 + 64 + 3 * 96 + 2 * 8) + 8
    per_token = 2 * body + 2 * 300 * 8 + 4 * 2 * 8 * 16
    for index in range(2):
        cost = json.loads((out / f"cost-{index:05}.json").read_text())
        assert cost["tokens"] == 320 and cost["flops"] == 320 * per_token
        assert cost["device"] == device_name(torch.device("cpu"))
        assert 0.1 < cost["seconds"] < 60  # two batches


def test_a_shard_is_not_done_before_its_cost_is_written(tmp_path, text_corpus, monkeypatch):
    """Else a process that was killed in between would leave a store of unknown cost."""
    written: list[str] = []

    def noting(own: Callable[[Path, Path], None], source: Path, target: Path) -> None:
        if Path(target).suffix in (".npy", ".json"):
            written.append(Path(target).name)
        own(source, target)

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, partial(noting, getattr(os, name)))
    config = LlamaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=0, num_attention_heads=1)
    source = ModelScores(SelectiveLM(LlamaForCausalLM(config)), Windows(text_corpus), ["entropy"])
    Scorer(source, text_corpus, tmp_path, 10, "float32").run(lambda count: None)
    names = ["logprobs-00000.npy", "entropy-00000.npy", "cost-00000.json", "logprobs-00000.json"]
    assert written[:4] == names


def test_the_models_lineage_goes_with_its_scores(tmp_path, references, tokenizer):
    assert reference_lineage(references.folder) is None
    lineage = {"corpus": "curated/train", "tokens_seen": 400_000, "train_seconds": 12.5}
    config = LlamaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=0, num_attention_heads=1)
    save_model(tmp_path / "model", LlamaForCausalLM(config), tokenizer, "card", lineage)
    copy_lineage(tmp_path / "model", references.folder)
    assert reference_lineage(references.folder) == lineage
    (references.folder / "lineage.json").unlink()
    (tmp_path / "model" / "slm.json").unlink()  # of another origin
    copy_lineage(tmp_path / "model", references.folder)
    assert reference_lineage(references.folder) is None
