"""Scores against closed forms; what is refused; what survives kills, company and full disks."""

import errno
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import warm
from slm import console
from slm.errors import UserError
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM, load_model
from slm.model.folder import save_model
from slm.score import command as score
from slm.score import scorer
from slm.score.command import ModelScores
from slm.score.scorer import Scorer
from slm.store.shards import Corpus, References, fingerprint
from slm.store.windows import Windows
from slm.verify import verify

V = 300


def tiny_llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **(small | heads | fields))).eval()


def bigram(table: np.ndarray) -> LlamaForCausalLM:
    """A Llama without layers whose logits after token a are table[a]."""
    model = tiny_llama(hidden_size=V, num_hidden_layers=0, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(V) * 1e3)  # the norm makes it sqrt(V)
        model.lm_head.weight.copy_(torch.from_numpy(table.T / math.sqrt(V)))
    return model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def model(tmp_path, tokenizer) -> Path:
    save_model(tmp_path / "model", tiny_llama(), tokenizer, "card", {})
    return tmp_path / "model"


def made(config: Any) -> Path:
    return Path(score.score(**config))


@pytest.fixture
def config(tmp_path, text_corpus, model) -> Any:
    return OmegaConf.create(
        {
            "corpus": str(text_corpus.folder),
            "reference_model": str(model),
            "requests": None,
            "responses": None,
            "served_model": None,
            "out": str(tmp_path / "references"),
            "max_tokens": None,
            "entropy": False,
            "columns": [],
            "batch_size": 3,
            "dtype": "float32",
            "store_dtype": "float32",
            "device": "cpu",
            "modules": [],
            "check": "size",
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Of what must not depend on the course; what scoring cost does, and comes with a shard."""
    costs = {path.name for path in folder.glob("cost-*.json")}
    done = {path.name.replace("logprobs", "cost") for path in folder.glob("logprobs-*.json")}
    assert done <= costs
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in costs}


def nobody(count: int) -> None: ...


# ---- the numbers --------------------------------------------------------------------------------


def test_bigram_scores_equal_the_closed_form_at_their_own_index(config, text_corpus, tokenizer):
    table = np.random.default_rng(0).normal(size=(V, V)) * 3
    save_model(Path(config.reference_model), bigram(table), tokenizer, "card", {})
    references = References.open(made(config))
    for index in range(2):
        tokens = text_corpus.column("tokens", index)
        scores = references.column("logprobs", index)
        expected = log_softmax(table[tokens[:-1]])[np.arange(len(tokens) - 1), tokens[1:]]
        assert np.isnan(scores[0])
        np.testing.assert_allclose(scores[1:], expected, rtol=0, atol=2e-5)
        # Off by one in either direction is far outside that tolerance.
        assert np.abs(scores[2:] - expected[:-1]).max() > 1
        assert np.abs(scores[1:-1] - expected[1:]).max() > 1


def test_scores_equal_the_models_own_logits_window_by_window(config, text_corpus):
    references = References.open(made(config))
    model = load_model(config.reference_model).double()
    for index in range(2):
        tokens = torch.from_numpy(text_corpus.column("tokens", index).astype(np.int64))
        expected = [torch.full((1,), torch.nan)]
        for start in range(0, len(tokens) - 1, 16):
            window = tokens[start : start + 17]
            with torch.no_grad():
                logprob = model(window[None, :-1]).logits[0].log_softmax(-1)
            expected.append(logprob.gather(1, window[1:, None])[:, 0])
        found = references.column("logprobs", index)
        np.testing.assert_allclose(found, torch.cat(expected), rtol=0, atol=2e-5)


def test_documents_packing_scores_each_document_alone(tmp_path, config, make_corpus):
    ids = np.random.default_rng(1).integers(0, V, 25)
    starts = [0, 3, 8, 12, 20]
    corpus = make_corpus(tmp_path / "packed", [ids], 8, "documents", [starts])
    config.corpus = str(corpus.folder)
    found = References.open(made(config)).column("logprobs", 0)
    assert np.flatnonzero(np.isnan(found)).tolist() == starts
    model = load_model(config.reference_model)
    for window in range(3):
        # A window's first token begins anew; within it each document does.
        cuts = sorted({window * 8, *(s for s in starts if window * 8 < s <= window * 8 + 8)})
        for start, stop in zip(cuts, [*cuts[1:], window * 8 + 9], strict=True):
            tokens = torch.from_numpy(ids[start:stop])
            with torch.no_grad():
                logprob = model(tokens[None]).logits[0].log_softmax(-1)
            expected = logprob[:-1].gather(1, tokens[1:, None])[:, 0]
            np.testing.assert_allclose(found[start + 1 : stop], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("context", "stride"), [(4, 1), (6, 3), (5, 5), (15, 2)])
@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_a_short_context_is_refreshed_by_strides(
    tmp_path, config, make_corpus, packing, context, stride
):
    """Each token by a forward of its own over what it may see, and no more."""
    ids = np.random.default_rng(1).integers(0, V, 33)
    corpus = make_corpus(tmp_path / "c", [ids], 16, packing, [[0, 3, 8, 21]])
    config.corpus, config.context, config.stride = str(corpus.folder), context, stride
    config.entropy = True
    store = References.open(made(config))
    found, entropy = store.column("logprobs", 0), store.column("entropy", 0)
    model, seen = load_model(config.reference_model), []
    for place in range(1, 33):
        if packing == "documents" and place in (3, 8, 21):
            assert np.isnan(found[place])
            continue
        window = (place - 1) // 16 * 16
        inside = place - 1 - window  # of the last token that it may see
        begin = window + next(b for b in range(0, 16, stride) if inside < b + context)
        if packing == "documents":
            begin = max(begin, *(s for s in (0, 3, 8, 21) if s < place))
        seen.append(place - begin)
        with torch.no_grad():
            logprobs = model(torch.from_numpy(ids[begin:place])[None]).logits[0, -1].log_softmax(-1)
        assert found[place] == pytest.approx(logprobs[ids[place]].item(), abs=2e-5)
        assert entropy[place] == pytest.approx(-(logprobs.exp() @ logprobs).item(), abs=2e-5)
    if packing == "concat":
        assert (
            max(seen) == context
        )  # where a window has more, at least context - stride + 1 of them
        assert min(n for n, p in zip(seen, range(1, 33), strict=True) if (p - 1) % 16 >= context) \
            == context - stride + 1  # fmt: skip
    cost = json.loads((Path(config.out) / "cost-00000.json").read_text())
    assert cost["tokens"] == 32 and cost["flops"] > 0


def test_a_short_context_is_part_of_what_the_scores_are(tmp_path, config, text_corpus):
    config.context, config.stride = 8, 4
    store = References.open(made(config))
    assert (store.manifest["context"], store.manifest["stride"]) == (8, 4)
    config.stride = 2
    with pytest.raises(UserError, match="stride is 4 in plan.json, 2 now"):
        made(config)
    config.context = config.stride = None
    with pytest.raises(UserError, match="context is 8 in plan.json, null now"):
        made(config)
    shards = [{"num_tokens": 17, "sha256": {"logprobs": "0"}}]
    body = dict(store.manifest) | {"shards": shards}
    others = [{}, {"context": 7}, {"stride": 5}]
    assert len({fingerprint(body | other) for other in others}) == 3
    for given, message in [
        ({"context": 16}, "context is 16, and a window of .* has 16: it would shorten nothing"),
        ({"stride": 4}, "stride is 4, and there is no context"),
        ({"context": 4, "stride": 5}, "stride is 5, context is 4: tokens between would be lost"),
        ({"context": 4, "scores": "vllm"}, "context is 4, but scores=vllm has the context of wh"),
        ({"context": 4, "reference_model": None, "requests": "x", "out": None,
          "served_model": "m"}, "context is 4, but requests has the context"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            made({**config, "out": str(tmp_path / "x"), **given})
    assert not (tmp_path / "x").exists()


def test_a_short_context_needs_no_more_positions_than_it_has(config, tokenizer):
    """A learned position table ends where it ends."""
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    save_model(Path(config.reference_model), new_model(gpt2, V, None), tokenizer, "card", {})
    with pytest.raises(UserError, match="seq_len is 16, model max_position_embeddings is 8: "):
        made(config)
    config.context = 8
    assert References.open(made(config)).manifest["context"] == 8


def test_prompts_get_no_score_and_change_none(tmp_path, config, make_corpus):
    ids = np.random.default_rng(1).integers(0, V, 25)
    live = np.ones(25, bool)
    live[[*range(1, 12), 20]] = False  # a whole window of 8, half of one, a token
    masks = [live.tolist()]
    for name, given in (("asked", masks), ("plain", None)):
        corpus = make_corpus(tmp_path / name, [ids], 8, masks=given)
        config.corpus, config.out = str(corpus.folder), str(tmp_path / f"{name}_scores")
        made(config)
    asked, plain = (References.open(tmp_path / f"{name}_scores") for name in ("asked", "plain"))
    found, expected = asked.column("logprobs", 0), plain.column("logprobs", 0)
    live[0] = False
    assert np.isnan(found).tolist() == (~live).tolist()
    np.testing.assert_array_equal(found[live], expected[live])
    assert [whole for _, whole, _ in verify(asked.folder)] == [True]


def test_bf16_mixed_is_autocast_over_float32_weights(config):
    """As the trainer computes; bfloat16 alone rounds the weights and the residuals too."""
    found = {}
    for dtype in ("bf16-mixed", "bfloat16", "float32"):
        config.dtype, config.out = dtype, str(Path(config.out).with_name(dtype))
        store = References.open(made(config))
        assert store.manifest["scoring"]["dtype"] == dtype
        found[dtype] = np.concatenate([store.column("logprobs", index)[1:] for index in (0, 1)])
    corpus, lm = Corpus.open(config.corpus), SelectiveLM(load_model(config.reference_model))
    batch = Windows(corpus).batch(np.arange(corpus.num_windows))
    plugin = MixedPrecision("bf16-mixed", "cpu")  # Lightning's own
    with torch.no_grad(), plugin.forward_context():
        expected = -lm(batch).loss.float().reshape(-1).numpy()
    np.testing.assert_allclose(found["bf16-mixed"], expected, rtol=0, atol=1e-6)
    for other in ("bfloat16", "float32"):
        assert np.abs(found[other] - expected).max() > 1e-4


def test_bfloat16_and_float16_stores_stay_near(config, tmp_path):
    exact = References.open(made(config)).column("logprobs", 0)
    config.store_dtype, config.out = "float16", str(tmp_path / "half")
    half = References.open(made(config))
    assert half.column("logprobs", 0).dtype == np.float16
    np.testing.assert_array_equal(half.column("logprobs", 0), exact.astype(np.float16))
    config.store_dtype, config.dtype, config.out = "float32", "bfloat16", str(tmp_path / "b")
    coarse = References.open(made(config)).column("logprobs", 0)
    np.testing.assert_allclose(coarse, exact, rtol=0, atol=0.1)
    assert not np.array_equal(coarse[1:], exact[1:])


def entropies(config: Any, tokens: np.ndarray) -> np.ndarray:
    """Of the model's own logits, in float64, at the index of the token that they predict."""
    model = load_model(config.reference_model).double()
    found = [np.array([np.nan])]
    for start in range(0, len(tokens) - 1, 16):
        window = torch.from_numpy(tokens[start : start + 16].astype(np.int64))
        with torch.no_grad():
            p = model(window[None]).logits[0].double().softmax(-1).numpy()
        found.append(-(p * np.log(p)).sum(-1))
    return np.concatenate(found)


def test_entropy_is_a_second_column_and_changes_nothing_in_the_first(
    config, text_corpus, tmp_path, tokenizer
):
    sharp = tiny_llama()
    with torch.no_grad():
        sharp.lm_head.weight *= 100  # a new model predicts log(V) everywhere
    save_model(Path(config.reference_model), sharp, tokenizer, "card", {})
    plain = References.open(made(config))
    config.entropy, config.out = True, str(tmp_path / "both")
    both = References.open(made(config), "full")
    assert both.fingerprint != plain.fingerprint
    for index in range(2):
        found = both.column("entropy", index)
        expected = entropies(config, text_corpus.column("tokens", index))
        assert found.dtype == np.float32 and np.isnan(found[0]) and expected[1:].std() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
        assert np.abs(found[2:] - expected[1:-1]).max() > 0.1  # off by one is far away
        first = both.column("logprobs", index)
        np.testing.assert_array_equal(first, plain.column("logprobs", index))
    assert both.manifest["scoring"]["entropy"] is True
    config.store_dtype, config.out = "float16", str(tmp_path / "half")
    half = References.open(made(config))
    kept = both.column("entropy", 0).astype(np.float16)
    np.testing.assert_array_equal(half.column("entropy", 0), kept)


def test_entropy_has_no_value_where_there_is_no_target(tmp_path, config, make_corpus):
    ids, starts = np.random.default_rng(1).integers(0, V, 25), [0, 3, 8, 12, 20]
    config.corpus = str(make_corpus(tmp_path / "d", [ids], 8, "documents", [starts]).folder)
    config.entropy = True
    found = References.open(made(config)).column("entropy", 0)
    assert np.flatnonzero(np.isnan(found)).tolist() == starts


def test_what_the_manifest_says(config, text_corpus):
    manifest = json.loads((made(config) / "manifest.json").read_text())
    assert manifest["corpus_fingerprint"] == text_corpus.fingerprint
    assert manifest["scoring"] == {
        "dtype": "float32",
        "store_dtype": "float32",
        "attn_implementation": "sdpa",
        "device": "cpu",
    }


# ---- what is refused ----------------------------------------------------------------------------


def permuted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens under other ids; equal in every size."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    names = [name for name in vocab if name != tokenizer.eos_token]
    ids = [vocab[name] for name in names]
    vocab.update(zip(names, ids[1:] + ids[:1], strict=True))
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    eos = tokenizer.eos_token
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)


def test_another_tokenizer_of_equal_size_is_refused(config, text_corpus, tokenizer):
    other = permuted(tokenizer)
    assert len(other) == len(tokenizer)
    save_model(Path(config.reference_model), tiny_llama(), other, "card", {})
    expected = text_corpus.manifest["tokenizer_sha256"]
    with pytest.raises(UserError, match=f"has tokenizer .* has {expected}"):
        made(config)
    assert not Path(config.out).exists()


def test_a_damaged_model_is_refused_with_check_full(config):
    path = Path(config.reference_model) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: sha256 \w+, slm"):
        made(OmegaConf.merge(config, {"check": "full"}))
    assert not Path(config.out).exists()
    made(config)


def test_another_run_in_the_same_folder_is_refused(config, tmp_path, tokenizer, make_corpus):
    made(config)
    before = contents(Path(config.out))
    other = make_corpus(tmp_path / "other", [np.arange(33)], 16)
    save_model(tmp_path / "wider", tiny_llama(1), tokenizer, "card", {})
    for change, message in [
        ({"corpus": str(other.folder)}, f"corpus_fingerprint is '.*', '{other.fingerprint}' now"),
        ({"reference_model": str(tmp_path / "wider")}, "model_sha256 is '.*', '.*' now"),
        ({"dtype": "bfloat16"}, "scoring is .*'dtype': 'float32'.*'dtype': 'bfloat16'.* now"),
        ({"store_dtype": "float16"}, "'store_dtype': 'float32'.*'store_dtype': 'float16'.* now"),
        ({"entropy": True}, "'store_dtype': 'float32'} in plan.json, .*'entropy': True.* now"),
        ({"direct": True}, "'store_dtype': 'float32'} in plan.json, .*'direct': True.* now"),
    ]:
        with pytest.raises(UserError, match=message.replace("is '.*'", "is '.*' in plan.json")):
            made(OmegaConf.merge(config, change))
    assert contents(Path(config.out)) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8', it must be one of"),
        ({"store_dtype": "bfloat16"}, "store_dtype is 'bfloat16', it must be one of"),
        ({"batch_size": 0}, "batch_size is 0, it must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5, it must be"),
        ({"device": "gpu"}, "device is 'gpu', and PyTorch finds none of that name here: cpu"),
        ({"reference_model": "no/such"}, "reference_model no/such is no model folder"),
        ({"corpus": "no/such"}, "no/such is not a finished corpus"),
        ({"check": "deep"}, "check is 'deep', it must be one of"),
        ({"reference_model": None}, "one of .* must be given, found none"),
        (
            {"reference_model": None, "responses": ["nowhere"], "served_model": "x"},
            "responses: nowhere is no file",
        ),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(config, change, message):
    with pytest.raises(UserError, match=message):
        made(OmegaConf.merge(config, change))
    assert not Path(config.out).exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_refused(config, tokenizer, value):
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[7] = value
    save_model(Path(config.reference_model), broken, tokenizer, "card", {})
    with pytest.raises(UserError, match="gives target 0 of window 0 log-prob nan, a finite"):
        made(config)


def test_a_token_that_is_not_finite_is_refused_with_its_window(tmp_path, make_corpus):
    corpus = make_corpus(
        tmp_path / "c", [np.r_[np.zeros(40, np.int64), 9, np.zeros(8, np.int64)]], 8
    )
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = math.nan
    (tmp_path / "out").mkdir()
    source = ModelScores(SelectiveLM(broken), Windows(corpus))
    writer = Scorer(source, corpus, tmp_path / "out", 4, "float32")
    with pytest.raises(UserError, match="of window 5 log-prob nan, a finite number <= 0"):
        writer.run(nobody)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_head_that_we_would_misread_is_refused(config, monkeypatch):
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output: Any = forward(self, *args, **kwargs)
        output.logits *= 0.5
        return output

    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="its logits are not its head applied"):
        made(config)


def test_windows_longer_than_the_model_reads_are_refused(config, tokenizer):
    short = tiny_llama(max_position_embeddings=8)
    save_model(Path(config.reference_model), short, tokenizer, "card", {})
    with pytest.raises(UserError, match="seq_len is 16, model max_position_embeddings is 8"):
        made(config)


# ---- disks --------------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_scoring(config, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=2567)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="2,568 bytes are needed, the disk has 2,567 free"):
        made(config)
    assert list(Path(config.out).glob("logprobs*")) == []


@pytest.mark.parametrize("failing", ["logprobs-00001.npy", "logprobs-00001.json"])
def test_a_full_disk_names_the_file_and_leaves_no_finished_shard(config, monkeypatch, failing):
    link = os.link

    def full(source: Path, target: Path) -> None:
        if Path(target).name == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target)

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(UserError, match=rf"{failing} cannot be written: No space left"):
        made(config)
    names = contents(Path(config.out)).keys() - {"logprobs-00001.npy"}
    assert names == {"plan.json", "logprobs-00000.npy", "logprobs-00000.json"}
    monkeypatch.undo()
    again = contents(made(config))
    assert "manifest.json" in again and "logprobs-00001.json" in again


# ---- the whole course ---------------------------------------------------------------------------


def test_size_and_time_are_said_first_and_speed_last(config, caplog):
    caplog.set_level(logging.INFO, "slm.score")
    made(config)
    first, last = caplog.messages[0], caplog.messages[-1]
    assert first.startswith("640 tokens to score: 0.0 MB on disk (") and "about 0:00:0" in first
    assert last.startswith("scored 640 tokens in ") and last.endswith("tokens/s)")


def test_lines_tell_of_progress_where_there_is_no_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    made(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scoring")]
    assert len(lines) == 14  # two shards of 20 windows by 3
    assert lines[-1].startswith("scoring 640/640 tokens") and lines[-1].endswith("0:00:00 left")


def test_a_finished_folder_is_left_alone(config, caplog, monkeypatch):
    out = made(config)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    caplog.set_level(logging.INFO, "slm.score")
    monkeypatch.setattr(score.ModelScores, "scores", None)
    assert made(config) == out
    assert caplog.messages == [f"{out} is finished already, nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.mark.parametrize("column", ["logprobs", "entropy"])
def test_a_shard_without_one_of_its_files_is_scored_again(config, column):
    config.entropy = True
    out = made(config)
    before = contents(out)
    (out / f"{column}-00001.npy").unlink()
    assert contents(made(config)) == before


def test_the_claim_of_a_dead_process_is_taken_over_and_cleared(config):
    expected = contents(made(config))
    shutil.rmtree(config.out)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = json.dumps({"host": socket.gethostname(), "pid": dead.pid})
    out = Path(config.out)
    out.mkdir()
    (out / "logprobs-00000.claim").write_text(owner)
    temporary = f".logprobs-00000.npy.{socket.gethostname()}-{dead.pid}.tmp"
    (out / temporary).write_bytes(b"half")
    assert contents(made(config)) == expected
    (out / temporary).write_bytes(b"half")  # killed when another had finished
    assert contents(made(config)) == expected


def test_what_another_machine_finishes_is_waited_for_and_counted(config, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "slm.score")
    out = made(config)
    expected = contents(out)
    for name in ("manifest.json", "logprobs-00000.json", "logprobs-00000.npy"):
        (out / name).unlink()
    claim = out / "logprobs-00000.claim"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    monkeypatch.setattr(scorer, "POLL_S", 0.02)
    advanced: list[int] = []
    lm, corpus = SelectiveLM(load_model(config.reference_model)), Corpus.open(config.corpus)
    writer = Scorer(ModelScores(lm, Windows(corpus)), corpus, out, 3, "float32")
    owns: list[int] = []
    waiting = threading.Thread(target=lambda: owns.append(writer.run(advanced.append)))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    (out / "logprobs-00000.npy").write_bytes(expected["logprobs-00000.npy"])
    (out / "logprobs-00000.json").write_bytes(expected["logprobs-00000.json"])
    waiting.join(10)
    assert owns == [0] and sum(advanced) == 320
    line = "waiting for shard 0 (pid 1 on elsewhere, logprobs-00000.claim)"
    assert caplog.messages.count(f"{out}: {line}") == 1


def test_a_shard_whose_claim_is_lost_is_not_written(config, monkeypatch, caplog):
    """Its process was suspended, and another has taken it; this one goes on with what is left."""
    expected = contents(made(config))
    shutil.rmtree(config.out)
    score_shard, path = Scorer.score_shard, Path(config.out) / "logprobs-00000.claim"

    def lose_the_first(self: Scorer, shard: Any, advance: Any) -> Any:
        if path.exists() and not caplog.records:
            path.unlink()
        return score_shard(self, shard, advance)

    monkeypatch.setattr(Scorer, "score_shard", lose_the_first)
    assert contents(made(config)) == expected
    assert f"has lost {path} to nobody" in caplog.text


# A process that has imported everything once and forks the workers: an import takes seconds.
WORKERS = textwrap.dedent(
    """
    import os, random, resource, shutil, signal, sys, time
    from omegaconf import OmegaConf
    from slm.score import command as score, reference, scorer
    from slm.errors import UserError
    from slm.model.build import load_model

    EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "sync")
    config, slow_s = OmegaConf.create(sys.argv[1]), float(sys.argv[2])
    load_model(config.reference_model)  # the first call takes a second
    compute = reference.checked
    scorer.POLL_S = 0.02

    def slowed(*arguments):
        time.sleep(slow_s)
        return compute(*arguments)

    reference.checked = slowed

    def kill_at(moment):
        # Before this process's so manieth call that opens, names, removes or syncs a file.
        left, fsync = moment, os.fsync

        def count(event, arguments):
            nonlocal left
            if event in EVENTS and str(arguments[0]).startswith(config.out + "/"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def sync(descriptor):
            count("sync", (config.out + "/",))
            fsync(descriptor)

        sys.addaudithook(count)
        os.fsync = sync

    def work(limit_bytes=None, moment=None):
        pid = os.fork()
        if pid:
            return pid
        if moment is not None:
            kill_at(moment)
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        try:
            score.score(**config)
        except UserError as error:
            os.write(1, str(error).encode())
            os._exit(1)
        os._exit(0)

    def end(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    """
)


def workers(config: Any, slow_s: float, course: str, *words: str) -> str:
    """Run `course` after WORKERS; returns what it printed."""
    code = WORKERS + textwrap.dedent(course)
    command = [sys.executable, "-c", code, OmegaConf.to_yaml(config), str(slow_s), *words]
    done = warm.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def many_shards(tmp_path, config, make_corpus) -> Any:
    """Twelve shards of six windows; the store of one undisturbed process beside the config."""
    generator = np.random.default_rng(2)
    shards = [generator.integers(0, V, 49) for _ in range(12)]
    config.corpus, config.entropy = str(make_corpus(tmp_path / "many", shards, 8).folder), True
    config.out = str(tmp_path / "whole")
    expected = contents(made(config))
    config.out = str(tmp_path / "shared")
    return config, expected


def test_processes_that_share_a_folder_write_what_one_writes(many_shards):
    config, expected = many_shards
    course = """
        for number in (2, 3):
            config.out = sys.argv[3] + str(number)
            codes = [end(pid) for pid in [work() for _ in range(number)]]
            assert codes == [0] * number, codes
    """
    workers(config, 0.01, course, config.out)
    for number in (2, 3):
        assert contents(Path(f"{config.out}{number}")) == expected


def test_killed_at_random_moments_it_ends_with_the_same_bytes(many_shards):
    """Moments are counted in calls that change the folder, so that no machine is too slow."""
    config, expected = many_shards
    course = """
        random.seed(0)
        killed, found = 0, set()
        while killed < 15:
            code = end(work(moment=random.randint(1, 80)))
            assert code in (0, -signal.SIGKILL), code
            killed += code != 0
            found.add(len(os.listdir(config.out)) if os.path.exists(config.out) else 0)
            if os.path.exists(config.out + "/manifest.json"):
                shutil.rmtree(config.out)  # whole too soon: once more from the beginning
        print(len(found), end(work()))
    """
    moments, last = map(int, workers(config, 0.0, course).split())
    assert moments >= 6 and last == 0
    assert contents(Path(config.out)) == expected


@pytest.mark.slow
def test_a_file_size_limit_is_one_sentence_and_no_finished_shard(config):
    course = "print(' code', end(work(limit_bytes=1000)))"
    said = workers(config, 0.0, course)
    assert "logprobs-00000.npy cannot be written" in said and said.endswith(" code 1\n")
    assert contents(Path(config.out)).keys() == {"plan.json"}
