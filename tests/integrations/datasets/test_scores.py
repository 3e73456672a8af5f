"""The column against log-softmax of all logits, row by row; TRL's packing keeps it aligned."""

import os
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, LargeList, List, Value
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from trl.data_utils import pack_dataset

import warm
from slm.errors import UserError
from slm.integrations.datasets import score_dataset
from slm.integrations.datasets import scores as dataset_scores

VOCABULARY = 120
LENGTHS = [5, 1, 17, 2, 0, 9, 30, 9, 12, 3]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # so that what stands before a token matters
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def token_lists() -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]


@torch.no_grad()
def expected(model: PreTrainedModel, ids: list[int]) -> list[float]:
    """By the definition: one row, unpadded, all logits in float32; NaN first."""
    if not ids:
        return []
    logits = model(torch.tensor([ids])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return [float("nan"), *(logprobs[t, ids[t + 1]].item() for t in range(len(ids) - 1))]


def assert_same(found: Any, wanted: Any) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert np.allclose(one, other, rtol=0, atol=1e-5, equal_nan=True), (one, other)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_log_softmax_of_the_models_logits(model, token_lists, batch_size, monkeypatch):
    monkeypatch.setattr(dataset_scores, "BATCHES_AT_ONCE", 2)
    dataset = Dataset.from_dict({"input_ids": token_lists, "text": ["x"] * len(token_lists)})
    scored = score_dataset(dataset, model, batch_size=batch_size)
    assert scored.column_names == ["input_ids", "text", "reference_logprob"]
    assert scored["input_ids"][:] == token_lists
    assert_same(scored["reference_logprob"][:], [expected(model, ids) for ids in token_lists])


@pytest.mark.parametrize("by", ["seq_lengths", "position_ids"])
def test_documents_of_a_row_are_scored_apart(model, token_lists, by):
    """Each as if it stood alone; rows of two and three documents, and of one."""
    groups = [[0, 2], [5], [6, 1, 3], [7, 8, 9]]
    lengths = [[LENGTHS[i] for i in group] for group in groups]
    restarts = [[i for n in row for i in range(n)] for row in lengths]
    columns = {"seq_lengths": lengths, "position_ids": restarts}
    packed = [[t for i in group for t in token_lists[i]] for group in groups]
    scored = score_dataset(Dataset.from_dict({"input_ids": packed, by: columns[by]}), model)
    wanted = [[s for i in group for s in expected(model, token_lists[i])] for group in groups]
    assert_same(scored["reference_logprob"][:], wanted)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("kind", [List, LargeList])
def test_packing_by_trl_keeps_the_column_aligned(model, strategy, kind):
    """Token by token: ids are unique, so that each says which score is its own."""
    generator = np.random.default_rng(2)
    cuts = np.sort(generator.choice(np.arange(1, VOCABULARY), 11, replace=False))
    lists = [part.tolist() for part in np.split(generator.permutation(VOCABULARY), cuts)]
    dataset = Dataset.from_dict({"input_ids": lists, "labels": lists})
    dataset = dataset.cast_column("input_ids", kind(Value("int64")))
    dataset = dataset.cast_column("labels", kind(Value("int64")))
    scored = score_dataset(dataset, model)
    assert scored.features["reference_logprob"] == kind(Value("float32"))
    own = {t: s for ids in lists for t, s in zip(ids, expected(model, ids), strict=True)}
    packed = pack_dataset(scored, 32, strategy, map_kwargs={"batch_size": 5})
    seen = [token for ids in packed["input_ids"] for token in ids]
    assert len(seen) == len(set(seen)) and (len(seen) == VOCABULARY or strategy == "bfd")
    assert max(len(ids) for ids in packed["input_ids"]) == 32
    wanted = [[own[token] for token in ids] for ids in packed["input_ids"]]
    assert_same(packed["reference_logprob"][:], wanted)
    assert packed["labels"][:] == packed["input_ids"][:]


def test_packed_rows_score_as_their_documents_did(model, token_lists):
    """Scored before packing or after: bfd says with seq_lengths what stands apart."""
    dataset = Dataset.from_dict({"input_ids": token_lists})
    before = pack_dataset(score_dataset(dataset, model), 32, "bfd")
    after = score_dataset(pack_dataset(dataset, 32, "bfd"), model)
    assert before["input_ids"][:] == after["input_ids"][:]
    assert_same(before["reference_logprob"][:], after["reference_logprob"][:])


def test_a_format_stays_as_it_was(model, token_lists):
    plain = Dataset.from_dict({"input_ids": token_lists[2:4], "extra": [1, 2]})
    dataset = plain.with_format("torch", columns=["input_ids"])
    scored = score_dataset(dataset, model)
    assert dataset.format["columns"] == ["input_ids"]
    assert scored.format == dataset.format | {"columns": ["input_ids", "reference_logprob"]}
    rows: list[Any] = [dict(row)["reference_logprob"] for row in scored]
    assert rows[0].dtype == torch.float32
    assert_same(rows, [expected(model, ids) for ids in token_lists[2:4]])


def test_a_model_in_training_is_asked_without_dropout_and_goes_on(token_lists):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).train()
    dataset = Dataset.from_dict({"input_ids": token_lists})
    scored = score_dataset(dataset, model)
    assert model.training and model.transformer.drop.training
    assert_same(
        scored["reference_logprob"][:], [expected(model.eval(), ids) for ids in token_lists]
    )


def test_chosen_and_shuffled_rows(model, token_lists):
    dataset: Any = Dataset.from_dict({"input_ids": token_lists}).select([6, 2, 8])
    scored = score_dataset(dataset, model)
    assert_same(
        scored["reference_logprob"][:], [expected(model, token_lists[i]) for i in (6, 2, 8)]
    )


def test_a_folder_is_cached_by_its_weights(model, token_lists, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"input_ids": token_lists}).save_to_disk(str(tmp_path / "data"))
    dataset = Dataset.load_from_disk(str(tmp_path / "data"))
    first = score_dataset(dataset, tmp_path / "model")
    assert_same(first["reference_logprob"][:], [expected(model, ids) for ids in token_lists])
    with monkeypatch.context() as patched:  # the second time nothing is computed
        patched.setattr(dataset_scores, "score_rows", lambda *_: 1 / 0)
        assert score_dataset(dataset, str(tmp_path / "model")).cache_files == first.cache_files
    other = LlamaForCausalLM(model.config).eval()
    other.save_pretrained(tmp_path / "model")  # the same name, other weights
    second = score_dataset(dataset, tmp_path / "model")
    assert_same(second["reference_logprob"][:], [expected(other, ids) for ids in token_lists])
    # Weights of a loaded model have no name: it is asked each time.
    for one in (model, other):
        found = score_dataset(dataset, one)["reference_logprob"][:]
        assert_same(found, [expected(one, ids) for ids in token_lists])


class Asked(Exception):
    pass


def test_another_way_of_computing_is_not_what_is_cached(model, token_lists, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"input_ids": token_lists}).save_to_disk(str(tmp_path / "data"))
    dataset = Dataset.load_from_disk(str(tmp_path / "data"))
    score_dataset(dataset, tmp_path / "model")

    def asked(*_: Any) -> None:
        raise Asked

    monkeypatch.setattr(dataset_scores, "score_rows", asked)
    score_dataset(dataset, tmp_path / "model")  # the same way: nothing is asked
    eager = LlamaForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    ways = [
        (dataset_scores, "__version__", "0.0.0"),
        (dataset_scores, "load_folder", lambda name: eager),
        (dataset_scores, "version", lambda name: f"another {name}"),
        (torch, "get_float32_matmul_precision", lambda: "high"),
    ]
    for owner, name, value in ways:
        with monkeypatch.context() as patched, pytest.raises(Asked):
            patched.setattr(owner, name, value)
            score_dataset(dataset, tmp_path / "model")


def test_the_way_of_computing_names_device_and_dtype(model):
    way = dataset_scores.way_of_computing(model)
    assert (way["device"], way["dtype"]) == ("cpu", "torch.float32")
    with torch.device("meta"):
        other = dataset_scores.way_of_computing(LlamaForCausalLM(model.config).bfloat16())
    assert (other["device"], other["dtype"]) == ("meta", "torch.bfloat16")


def test_autocast_around_it_changes_no_score(model, token_lists):
    dataset = Dataset.from_dict({"input_ids": token_lists})
    with torch.autocast("cpu", torch.bfloat16):
        scored = score_dataset(dataset, model)
    assert_same(scored["reference_logprob"][:], [expected(model, ids) for ids in token_lists])


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"input_ids": [[1, 2], [3, VOCABULARY]]}, r"row 1: input_ids\[1\] is 120.*has 120"),
        ({"input_ids": [[1, 2], [-100, 4]]}, r"row 1: input_ids\[0\] is -100"),
        ({"input_ids": [[1], [2] * 65]}, "row 1 has 65 tokens.*max_position_embeddings is 64"),
        ({"input_ids": [[1]], "reference_logprob": [[-1.0]]}, "has a column reference_logprob"),
        ({"input_ids": []}, "the dataset has 0 rows"),
        ({"text": ["a"]}, "has no input_ids, it has text"),
        ({"input_ids": [[1, 2]], "seq_lengths": [[1]]}, r"row 0: seq_lengths is \[1\]"),
        (
            {"input_ids": [[1, 2], [0, 2]], "attention_mask": [[1, 1], [0, 1]]},
            r"row 1: attention_mask\[0\] is 0, 1 is expected: rows without padding",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(model, columns, sentence, monkeypatch):
    """Also where it stands in a later batch of the map: the row's number is the dataset's."""
    monkeypatch.setattr(dataset_scores, "BATCHES_AT_ONCE", 1)
    with pytest.raises(ValueError, match=sentence):
        score_dataset(Dataset.from_dict(columns), model, batch_size=1)


def test_scores_that_are_not_finite_are_refused(model, token_lists):
    broken = LlamaForCausalLM(model.config).eval()
    broken.load_state_dict(model.state_dict())
    broken.model.embed_tokens.weight.data[77] = torch.nan  # of a token that the probe lacks
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5], [5, 77, 8]]})
    with pytest.raises(ValueError, match=r"row 2: input_ids\[1\]: the model's log-prob is nan"):
        score_dataset(dataset, broken)


def test_models_that_do_not_fit_are_refused(token_lists, tmp_path):
    dataset = Dataset.from_dict({"input_ids": token_lists})
    with pytest.raises(UserError, match="there is no such folder"):
        score_dataset(dataset, tmp_path / "no" / "model")
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    with pytest.raises(ValueError, match="row 6 has 30 tokens.*max_position_embeddings is 16"):
        score_dataset(dataset, GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="the model is in torch.bfloat16; scores are made in"):
        score_dataset(dataset, GPT2LMHeadModel(config).bfloat16())


def test_a_model_that_mixes_documents_scores_rows_but_no_packed_ones(token_lists):
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval()
    whole = Dataset.from_dict({"input_ids": token_lists})
    wanted = [expected(model, ids) for ids in token_lists]
    assert_same(score_dataset(whole, model)["reference_logprob"][:], wanted)
    packed: Any = whole.add_column("seq_lengths", [[n] if n else [] for n in LENGTHS])
    with pytest.raises(UserError, match="MambaForCausalLM does not keep documents apart"):
        score_dataset(packed, model)


@pytest.mark.slow
def test_the_example_prints_tokens_beside_their_scores(tmp_path, tokenizer):
    """Of the longest of three texts, which the first packed row begins with."""
    root = Path(__file__).resolve().parents[3]
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=2048)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "t")
    script = root / "experiments" / "doors" / "score_own_dataset.py"
    words = ["--tokenizer", str(tmp_path / "t"), "--model", str(tmp_path / "m"), "--rows", "3"]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    settings = {"PYTHONPATH": paths, "HF_HOME": str(tmp_path)}
    done = warm.run(  # reads HF_HOME as it imports datasets
        [sys.executable, script, *words],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr
    texts = [topics[name][:400] for name in sorted(topics)[:3]]
    rows = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    ids = max(rows, key=len)[:512]
    title, *lines = done.stdout.splitlines()
    assert title.endswith("packed rows: input_ids, labels, reference_logprob, seq_lengths")
    scores = expected(model, ids)[:12]
    wanted = [f"{tokenizer.decode([t])!r:>16} {s:8.3f}" for t, s in zip(ids, scores, strict=False)]
    assert lines == wanted
