"""Loss and bits per byte against sums made by hand in float64."""

import csv
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slm.checks import check
from slm.command_keys import EVALUATE
from slm.errors import UserError
from slm.evaluate import command as evaluation
from slm.evaluate.command import corpus_loss, evaluate, window_losses
from slm.model.build import SelectiveLM
from slm.model.folder import save_model
from slm.prepare.encoder import token_bytes
from slm.store.files import read_json, write_csv, write_record
from slm.store.hub import looks_like_hub_name
from slm.store.shards import Corpus
from slm.store.tokenizer import train_tokenizer
from slm.store.windows import Windows

V = 300


def tiny_llama(seed: int = 0, rope_theta: float = 1e4) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    rope: Any = {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}}
    config = LlamaConfig(vocab_size=V, attention_dropout=0.5, **sizes, **heads, **rope)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def lm() -> SelectiveLM:
    return SelectiveLM(tiny_llama())


def nats_by_hand(model: Any, tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """-log p in float64 of every token but the first."""
    model = model.double()
    nats = []
    for start in range(0, len(tokens) - 1, seq_len):
        window = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))
        with torch.no_grad():
            logprob = model(window[None, :-1]).logits[0].log_softmax(-1)
        nats += (-logprob.gather(1, window[1:, None])[:, 0]).tolist()
    return np.array(nats)


def settings(**changes: Any) -> dict[str, Any]:
    defaults = {"batch_size": 3, "max_windows": None, "device": "cpu", "check": "size", "out": None}
    return defaults | {"dtype": "float32"} | changes


# ---- one model on one set -----------------------------------------------------------------------


def test_loss_and_bits_per_byte_equal_float64_sums(lm, text_corpus, tokenizer):
    found = corpus_loss(lm, text_corpus, batch_size=3)
    sizes, nats, num_bytes = token_bytes(tokenizer), [], 0
    for index in range(2):
        tokens = np.asarray(text_corpus.column("tokens", index))
        nats.append(nats_by_hand(tiny_llama(), tokens, 16))
        num_bytes += int(sizes[tokens[1:]].sum())
    total = np.concatenate(nats).sum()
    assert (found.num_targets, found.num_bytes) == (640, num_bytes)
    assert found.loss == pytest.approx(total / 640, abs=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, abs=1e-5)


def test_sums_of_a_model_on_apples_gpu_are_on_the_cpu(lm, text_corpus, monkeypatch):
    """mps has no float64."""
    expected = corpus_loss(lm, text_corpus, batch_size=3)
    there = SimpleNamespace(device=torch.device("mps"))
    monkeypatch.setattr(lm, "parameters", lambda: iter([there]))
    monkeypatch.setattr(evaluation, "to_device", lambda batch, device: batch)
    assert corpus_loss(lm, text_corpus, batch_size=3) == expected


def test_eos_counts_its_nats_and_no_bytes(lm, tmp_path, tokenizer, make_corpus):
    words = tokenizer.encode("caf\u00e9 la")
    ids = np.array([*words, tokenizer.eos_token_id])
    corpus = make_corpus(tmp_path / "c", [ids], len(ids) - 1)
    found = corpus_loss(lm, corpus, 8)
    total = nats_by_hand(tiny_llama(), ids, len(ids) - 1).sum()
    first = len(tokenizer.decode(words[:1]).encode())
    assert found.num_targets == len(words)  # the first token is none, EOS is one
    assert found.num_bytes == len("caf\u00e9 la".encode()) - first
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.num_bytes, abs=1e-5)


def test_documents_packing_leaves_out_masked_targets_and_their_bytes(lm, tmp_path, make_corpus):
    ids = np.random.default_rng(1).integers(0, V, 13)
    starts = [0, 3, 8]
    corpus = make_corpus(tmp_path / "c", [ids], 12, "documents", [starts])
    found = corpus_loss(lm, corpus, 8)
    pieces = [ids[0:3], ids[3:8], ids[8:13]]
    nats = sum(nats_by_hand(tiny_llama(), piece, len(piece) - 1).sum() for piece in pieces)
    live = [index for index in range(1, 13) if index not in starts]
    assert found.num_targets == len(live) == 10
    assert found.num_bytes == int(corpus.column("bytes", 0)[live].sum())
    assert found.loss == pytest.approx(nats / 10, abs=1e-5)


def test_prompts_count_neither_nats_nor_bytes(lm, tmp_path, make_corpus):
    ids = np.random.default_rng(1).integers(0, V, 13)
    live = [False] * 9 + [True, False, True, True]  # the first window of six has no target
    corpus = make_corpus(tmp_path / "c", [ids], 6, masks=[live])
    whole = make_corpus(tmp_path / "whole", [ids], 6)
    batch = Windows(whole).batch(np.array([1]))
    with torch.no_grad():
        nats = lm(batch).loss[0].double()
    places = [2, 4, 5]  # tokens 9, 11 and 12 are targets 2, 4 and 5 of the second window
    sizes = np.asarray(whole.column("bytes", 0), np.int64)[[9, 11, 12]]
    found = corpus_loss(lm, corpus, batch_size=1)
    assert (found.num_targets, found.num_bytes) == (3, sizes.sum())
    assert found.loss == pytest.approx(nats[places].mean().item(), rel=1e-5)
    assert math.isnan(corpus_loss(lm, corpus, 1, max_windows=1).loss)


def test_a_subset_takes_evenly_spread_windows(lm, text_corpus):
    found = corpus_loss(lm, text_corpus, 8, max_windows=4)  # of 40: 0, 10, 20, 30
    tokens = [np.asarray(text_corpus.column("tokens", index)) for index in range(2)]
    windows = [tokens[number // 20][number % 20 * 16 :][:17] for number in (0, 10, 20, 30)]
    nats = np.concatenate([nats_by_hand(tiny_llama(), window, 16) for window in windows])
    assert found.num_targets == 64
    assert found.loss == pytest.approx(nats.mean(), abs=1e-5)


def test_every_window_has_its_own_sums(lm, text_corpus):
    found = window_losses(lm, text_corpus, batch_size=2, max_windows=5)
    assert len(found.window) == 5
    lm.eval()
    for window, nats, targets, num_bytes in zip(*found, strict=True):
        batch = Windows(text_corpus).batch(np.array([window]))
        logits = lm.model(batch["input_ids"]).logits.double()
        logprobs = logits[0].log_softmax(-1)
        expected = -logprobs[torch.arange(len(logprobs)), batch["targets"][0]].sum()
        assert nats == pytest.approx(expected.item(), rel=1e-6)
        assert targets == batch["targets"].numel()
        assert num_bytes == Windows(text_corpus).target_bytes(np.array([window])).sum()
    assert found.total() == corpus_loss(lm, text_corpus, 2, 5)


def test_the_size_of_batches_does_not_matter(lm, text_corpus):
    losses = [corpus_loss(lm, text_corpus, size).loss for size in (1, 7, 40, 1000)]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)


def test_progress_is_told_of_every_token(lm, text_corpus):
    counts: list[int] = []
    corpus_loss(lm, text_corpus, 16, None, counts.append)
    assert counts == [256, 256, 128]


def seed_all() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def random_numbers() -> tuple[Any, ...]:
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back_and_no_random_number_is_drawn(lm, text_corpus, training):
    lm.train(training)
    seed_all()
    expected = random_numbers()
    seed_all()
    first = corpus_loss(lm, text_corpus, 8)
    assert random_numbers() == expected
    assert [module.training for module in lm.modules()] == [training] * len(list(lm.modules()))
    assert corpus_loss(lm, text_corpus, 8) == first  # dropout was off
    assert all(parameter.grad is None for parameter in lm.parameters())


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path, tokenizer) -> dict[str, str]:
    for seed, name in enumerate("ab"):
        save_model(tmp_path / name, tiny_llama(seed), tokenizer, "card", {})
    return {name: str(tmp_path / name) for name in "ab"}


@pytest.fixture
def sets(tmp_path, text_corpus, make_corpus) -> dict[str, str]:
    other = make_corpus(tmp_path / "other", [np.arange(33)], 16)
    return {"text": str(text_corpus.folder), "other": str(other.folder)}


def test_every_model_meets_every_set_and_the_table_says_so(tmp_path, models, sets):
    rows = evaluate(models, sets, **settings())
    write_csv(tmp_path / "new" / "table.csv", rows)
    with open(tmp_path / "new" / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["model", "set", "loss", "bits_per_byte", "num_targets", "num_bytes"]
    names = [(row["model"], row["set"]) for row in table]
    assert names == [("a", "text"), ("a", "other"), ("b", "text"), ("b", "other")]
    for row, seed in zip(table, (0, 0, 1, 1), strict=True):
        expected = corpus_loss(SelectiveLM(tiny_llama(seed)), Corpus.open(sets[row["set"]]), 3)
        assert float(row["loss"]) == pytest.approx(expected.loss, abs=1e-6)
        assert float(row["bits_per_byte"]) == pytest.approx(expected.bits_per_byte, abs=1e-6)
        assert int(row["num_targets"]) == expected.num_targets
        assert int(row["num_bytes"]) == expected.num_bytes


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_losses_by_position_are_sums_over_the_targets_there(tmp_path, models, make_corpus, packing):
    """A position is the number of tokens before a target that the model sees, less one."""
    ids, starts = np.random.default_rng(1).integers(0, V, 25), [0, 5, 14]
    corpus = make_corpus(tmp_path / "c", [ids], 12, packing, [starts])
    given = settings(by_position=[2, 5, 12], out=str(tmp_path / "a.csv"))
    rows = evaluate({"a": models["a"]}, {"c": str(corpus.folder)}, **given)
    nats, model = {}, tiny_llama(0).double()  # by place in the shard: position, loss
    for place in range(1, 25):
        begin = (place - 1) // 12 * 12
        if packing == "documents":
            begin = max(begin, *(start for start in starts if start < place))
        if packing == "documents" and place in starts:
            continue
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[begin:place])[None]).logits[0, -1]
        nats[place] = (place - 1 - begin, -logits.log_softmax(-1)[ids[place]].item())
    sizes = corpus.column("bytes", 0)
    spans = [(0, 12), (0, 2), (2, 5), (5, 12)]
    assert [(row["from_position"], row["to_position"]) for row in rows] == spans
    for row, (begin, end) in zip(rows, spans, strict=True):
        mine = {place: loss for place, (at, loss) in nats.items() if begin <= at < end}
        assert row["num_targets"] == len(mine)
        assert row["num_bytes"] == sum(int(sizes[place]) for place in mine)
        assert row["loss"] == pytest.approx(sum(mine.values()) / len(mine), abs=1e-5)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "a.csv", newline="") as file:
        assert [int(row["num_targets"]) for row in csv.DictReader(file)] == [
            row["num_targets"] for row in rows
        ]
    with pytest.raises(UserError, match=r"by_position is \[4, 4\], each must be more than the one"):
        evaluate({"a": models["a"]}, {"c": str(corpus.folder)}, **settings(by_position=[4, 4]))


def test_longer_windows_are_read_with_an_override(tmp_path, models, sets, tokenizer, monkeypatch):
    short = tiny_llama(2)
    short.config.max_position_embeddings = 15
    save_model(tmp_path / "c", short, tokenizer, "card", {})
    named = models | {"c": str(tmp_path / "c")}
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "window_losses", None)  # said before the first forward
        message = (
            f"^model {tmp_path / 'c'}, set text: seq_len is 16, model max_position_embeddings is "
            "15: override={max_position_embeddings: 16} asks it all the same$"
        )
        with pytest.raises(UserError, match=message):
            evaluate(named, sets, **settings())
    override = {"max_position_embeddings": 16, "rope_theta": 50.0}
    found = evaluate(named, sets, **settings(override=override))[-2]
    other = tiny_llama(2, rope_theta=50.0)
    expected = corpus_loss(SelectiveLM(other), Corpus.open(sets["text"]), 3)
    plain = corpus_loss(SelectiveLM(tiny_llama(2)), Corpus.open(sets["text"]), 3)
    assert found["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert abs(plain.loss - expected.loss) > 1e-6


def test_another_tokenizer_is_refused_before_any_forward(
    tmp_path, models, sets, tokenizer, monkeypatch
):
    other = train_tokenizer(["quite another text, with other merges " * 20], 280)
    save_model(tmp_path / "c", tiny_llama(), other, "card", {})
    monkeypatch.setattr(evaluation, "corpus_loss", None)
    folder = sets["text"]
    with pytest.raises(UserError, match=rf"model .*c has tokenizer \w+, {folder} has \w+"):
        evaluate(models | {"c": str(tmp_path / "c")}, sets, **settings())


def flip_weights(folder: str) -> None:
    path = Path(folder) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_model_is_refused_with_check_full(models, sets):
    flip_weights(models["b"])
    with pytest.raises(UserError, match=r"b/model\.safetensors is damaged: sha256 \w+, slm.json"):
        evaluate(models, sets, **settings(check="full"))
    assert len(evaluate(models, sets, **settings())) == 4
    Path(models["b"], "slm.json").unlink()  # of another origin: nobody knows its hashes
    assert len(evaluate(models, sets, **settings(check="full"))) == 4


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        ({"precision": "16-mixed"}, "precision is '16-mixed', expected one of 32-true, bf16-mixed"),
        ({"precision": ["32-true"]}, r"precision is \['32-true'\], expected one of"),
        ("none", "lineage is 'none', expected an object"),
    ],
)
def test_a_record_that_says_nonsense_is_one_sentence(models, sets, lineage, message):
    path = Path(models["a"], "slm.json")
    write_record(path, read_json(path) | {"lineage": lineage})
    with pytest.raises(UserError, match=f"a/slm.json: {message}"):
        evaluate(models, sets, **settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models is {}, it must be {name: folder, ...}, one or more"),
        ({"sets": None}, "sets is null, it must be {name: folder, ...}, one or more"),
        ({"models": ["m"]}, r"models is \['m'\], it must be {name: folder, ...}"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_windows": -1}, "max_windows is -1"),
        ({"out": "."}, "out is '.', it must be a file, no folder, or null"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    config = settings(**({"models": {"a": "m"}, "sets": {"b": "c"}} | changes))
    with pytest.raises(UserError, match=message):
        check(config, EVALUATE)


@pytest.mark.parametrize("name", ["no/such/model", "./nothing"])
def test_a_mistyped_path_is_not_looked_for_on_a_hub(sets, name):
    with pytest.raises(UserError, match=f"model {name}: there is no such folder"):
        evaluate({"a": name}, sets, **settings())


def test_an_adapter_is_no_model(sets, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a PEFT adapter: merge it into its model"):
        evaluate({"a": str(tmp_path)}, sets, **settings())


def test_a_mistyped_name_in_a_folder_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert not looks_like_hub_name("runs/bse")
    assert looks_like_hub_name("EleutherAI/pythia-14m")
    assert looks_like_hub_name("gpt2")
