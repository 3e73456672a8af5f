"""The loss inside `SelectiveLM` is the model's own, or the model is refused."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    XLNetConfig,
)

import warm
from gguf_helpers import write_gguf
from model_helpers import (
    APART,
    ARCHITECTURES,
    LENGTH,
    LLAMA,
    RECURRENT_OR_BLIND,
    REFUSED,
    SIZES,
    TRAINABLE,
    VOCAB,
    make_batch,
    make_lm,
)
from slm.errors import UserError
from slm.model.architecture import (
    check_length,
    new_model,
    override_config,
    position_limit,
    positions_of,
)
from slm.model.build import (
    SelectiveLM,
    build_lm,
    check_model,
    check_saved,
    check_trainable,
    load_model,
    set_special_ids,
)
from slm.model.folder import save_model
from slm.model.head import head_arguments, loss_terms
from slm.model.serving import broken_rules
from slm.store.tokenizer import load_tokenizer, train_tokenizer
from slm.store.windows import IGNORE_INDEX, Batch
from slm.train.module import norm_of, scale_gradients
from slm_kernels import select_top_k

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)


def own_losses(model: PreTrainedModel, batch: Batch) -> Tensor:  # (B, T)
    """Cross-entropy of the logits that the model itself gives."""
    positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    logits = model(batch["input_ids"], use_cache=False, **positions).logits
    flat = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return flat.view(batch["targets"].shape)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def everything(batch: Batch) -> Tensor:  # (B, T)
    return batch["targets"] != IGNORE_INDEX


def top_excess(batch: Batch, reference: Any, ratio: float, scope: str = "batch") -> Any:
    """The mask of the paper's rule, made of the token losses."""
    return lambda loss: select_top_k(loss - reference, everything(batch), ratio, scope=scope)


# ---- the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINABLE)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name):
    lm, batch = make_lm(name), make_batch()
    expected = own_losses(lm.model, batch)
    torch.testing.assert_close(lm(batch).loss, expected.detach(), rtol=1e-5, atol=1e-5)
    (expected.sum() / (batch["targets"] != IGNORE_INDEX).sum()).backward()
    own = gradients(lm)
    output = lm(batch, everything(batch))
    torch.testing.assert_close(output.token_loss, expected.detach(), rtol=1e-5, atol=1e-5)
    output.loss.backward()
    ours = gradients(lm)
    assert ours.keys() == own.keys()
    for key in own:
        torch.testing.assert_close(ours[key], own[key], rtol=1e-4, atol=1e-6)
    check_model(lm, batch)


def test_loss_over_all_tokens_is_the_one_that_transformers_trains_on():
    lm = make_lm("llama")
    ids = torch.randint(2, VOCAB, (2, LENGTH + 1))
    own = lm.model(ids, labels=ids).loss  # shifts by itself
    own.backward()
    expected = gradients(lm)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    loss = lm(batch, everything(batch)).loss
    loss.backward()
    torch.testing.assert_close(loss, own)
    for key, gradient in gradients(lm).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


def test_selection_scores_every_target_and_trains_on_the_selected_alone():
    lm, batch = make_lm("llama"), make_batch()
    losses = own_losses(lm.model, batch)
    reference = 4 * torch.rand(batch["targets"].shape)
    output = lm(batch, top_excess(batch, reference, 0.4, "sequence"), denominator=7.0)
    torch.testing.assert_close(output.token_loss, losses.detach(), rtol=1e-5, atol=1e-5)
    chosen = output.token_weight != 0
    assert chosen.sum(1).tolist() == [5, 4]  # of 12 and 11
    for row, excess in enumerate((losses - reference).detach()):
        live = batch["targets"][row] != IGNORE_INDEX
        kept, left = excess[chosen[row]], excess[live & ~chosen[row]]
        assert kept.min() > left.max()
    output.loss.backward()
    ours = gradients(lm)
    (losses[chosen].sum() / 7.0).backward()
    for key, gradient in gradients(lm).items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6)


def test_unselected_tokens_stay_in_the_context():
    lm, batch = make_lm("llama"), make_batch()
    last = torch.zeros_like(everything(batch))
    last[:, -1] = True  # only the last target of each window is trained on
    output = lm(batch, last)
    torch.testing.assert_close(output.token_loss, lm(batch).loss)
    output.loss.backward()
    embedding: Any = lm.model.get_input_embeddings()
    seen = embedding.weight.grad.abs().sum(1)[batch["input_ids"].unique()]
    assert (seen > 0).all()


def test_scoring_makes_no_graph():
    lm, batch = make_lm("llama"), make_batch()
    assert not lm(batch).loss.requires_grad


def test_autocast_selects_by_float32_scores_of_its_own_operands():
    lm, batch = make_lm("llama"), make_batch()
    reference = torch.full(batch["targets"].shape, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        output = lm(batch, top_excess(batch, reference, 0.5))
        hidden = lm.hidden(batch)
    weight = head_arguments(lm.model)["weight"]
    logits = hidden.bfloat16().float() @ weight.bfloat16().float().T
    exact = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    assert output.token_loss.dtype == torch.float32
    torch.testing.assert_close(output.token_loss.flatten(), exact, rtol=1e-6, atol=1e-6)
    rounded = output.token_loss.bfloat16().float()
    assert (rounded != output.token_loss).float().mean() > 0.9


# ---- documents ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", APART)
def test_position_ids_keep_documents_apart(name):
    lm, batch = make_lm(name).eval(), make_batch(documents=True)
    before = lm(batch).loss
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 2] = (changed["input_ids"][:, 2] + 1) % VOCAB
    after = lm(changed).loss
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert torch.equal(before[:, :2], after[:, :2])
    assert (before[:, 2:4] != after[:, 2:4]).any()
    check_model(lm, batch)


@pytest.mark.parametrize("name", APART)
def test_loss_of_a_document_is_its_loss_alone(name):
    lm, batch = make_lm(name).eval(), make_batch(documents=True)
    together = lm(batch).loss
    for begin, end in ((0, 5), (5, 9), (9, LENGTH)):
        alone = {key: batch[key][:, begin:end] for key in ("input_ids", "targets")}
        torch.testing.assert_close(lm(alone).loss, together[:, begin:end], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RECURRENT_OR_BLIND)
def test_a_model_that_mixes_documents_is_refused_where_they_are_apart(name):
    lm = make_lm(name)
    check_model(lm, make_batch())
    with pytest.raises(UserError, match=f"{type(lm.model).__name__} does not keep documents apart"):
        check_model(lm, make_batch(documents=True))


# ---- refusal --------------------------------------------------------------------------------


def test_windows_of_prompts_alone_do_not_hide_other_logits():
    batch = make_batch()
    batch["targets"] = torch.full_like(batch["targets"], IGNORE_INDEX)
    check_model(make_lm("llama"), batch)
    with pytest.raises(UserError, match="its logits are not its head"):
        check_model(make_lm(REFUSED[0]), batch)


def test_a_backbone_without_hidden_states_is_refused():
    """Its base model is itself: the backbone has a name that base_model_prefix does not say."""
    fields = {"intermediate_size_mlp": 24, "num_local_experts": 2, "head_dim": 4}
    model = new_model(LLAMA | {"model_type": "llama4_text"} | fields, VOCAB, None)
    with pytest.raises(UserError, match="^Llama4ForCausalLM has no base model that gives hidden"):
        check_model(SelectiveLM(model), make_batch())


def test_a_model_that_computes_no_batch_is_one_sentence():
    lm = make_lm("llama")
    lm.model.get_submodule("model.layers.1").mlp = torch.nn.Linear(LENGTH, 3)
    with pytest.raises(
        UserError, match=r"^LlamaForCausalLM computes no batch: RuntimeError: [^\n]+$"
    ):
        check_model(lm, make_batch())


def test_check_puts_the_mode_back_and_leaves_no_hook():
    for training in (True, False):
        lm = make_lm("llama").train(training)
        before = lm.model(make_batch()["input_ids"]).logits
        check_model(lm, make_batch(documents=True))
        assert lm.training is training and lm.model.training is training
        assert torch.equal(before, lm.model(make_batch()["input_ids"]).logits)
        assert all(p.grad is None for p in lm.parameters())


def test_a_model_whose_weights_depend_on_its_mode_is_refused():
    lm = make_lm("rwkv", rescale_every=1)  # from the second layer on
    message = r"RwkvForCausalLM changes .*blocks\.1\.attention.*; it does not with rescale_every=0"
    with pytest.raises(UserError, match=message):
        check_trainable(lm, make_batch())
    for fields in ({"rescale_every": 0}, {"rescale_every": 2}):  # 2: what is divided by 1 stays
        check_trainable(make_lm("rwkv", **fields), make_batch())


def test_an_attention_of_other_devices_is_checked_with_torchs(monkeypatch, tmp_path):
    def flash(module, query, *args, **kwargs):
        raise RuntimeError("takes float16 and bfloat16 of CUDA only")

    monkeypatch.setitem(AttentionInterface._global_mapping, "of_cuda", flash)
    lm = make_lm("llama")
    lm.model.save_pretrained(tmp_path)
    lm.model.set_attn_implementation("of_cuda")
    check_trainable(lm, make_batch(documents=True))
    check_saved(lm, make_batch(), tmp_path)
    assert lm.model.config._attn_implementation == "of_cuda"
    with pytest.raises(RuntimeError, match="of CUDA only"):
        lm.model(make_batch()["input_ids"])


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_saved_folder_is_the_model_or_is_refused(tmp_path, name):
    lm, batch = make_lm(name), make_batch()
    lm.model.save_pretrained(tmp_path)
    check_saved(lm, batch, tmp_path)
    assert lm.training and lm.model.training
    with torch.no_grad():
        head_arguments(lm.model)["weight"].mul_(0.5)
    with pytest.raises(UserError, match="the loss of one batch is .* as trained and .* as saved"):
        check_saved(lm, batch, tmp_path)


def test_windows_longer_than_the_model_are_refused():
    lm = make_lm("llama", max_position_embeddings=LENGTH - 1)
    with pytest.raises(UserError, match="seq_len is 12, .*max_position_embeddings is 11"):
        check_model(lm, make_batch())


def gemma3(**text: Any) -> PreTrainedModel:
    """Its config holds one for the text and one for pictures."""
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=SIZES | {"vocab_size": VOCAB, "num_key_value_heads": 1, "head_dim": 8} | text,
        vision_config=widths | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return AutoModelForCausalLM.from_config(config)


def test_the_positions_of_a_nested_config_are_its_texts():
    lm = SelectiveLM(gemma3(max_position_embeddings=LENGTH - 1))
    with pytest.raises(UserError, match="seq_len is 12, .*max_position_embeddings is 11"):
        check_model(lm, make_batch())
    check_model(SelectiveLM(gemma3(max_position_embeddings=LENGTH)), make_batch())


def test_positions_of_what_is_not_built_yet(saved):
    assert positions_of(None, {"model_type": "gpt2", "n_positions": 24}) == 24
    assert positions_of(None, {"model_type": "llama"}) == 2048
    assert positions_of(None, {"model_type": "gru"}) is None  # whoever builds it refuses it
    assert positions_of(str(saved), None) == 32
    assert positions_of(str(saved), None, {"max_position_embeddings": 64}) == 64
    assert positions_of(str(saved / "nowhere"), None) is None


def test_positions_of_minus_one_are_no_limit():
    config = XLNetConfig()
    assert config.max_position_embeddings == -1
    check_length(config, 10**6)


def test_a_nested_config_keeps_the_ids_to_stop_at(tokenizer):
    model = gemma3(eos_token_id=[7, 9], vocab_size=300)
    set_special_ids(model, tokenizer, loaded=True)
    expected = [7, 9, tokenizer.eos_token_id]
    for config in (model.config, model.config.text_config, model.generation_config):
        assert config.eos_token_id == expected
    assert model.config.bos_token_id == model.config.text_config.bos_token_id == 1  # their own


# ---- building -------------------------------------------------------------------------------


@pytest.fixture
def build(tokenizer):
    def make(
        init_from: Path | None = None, fields: dict[str, Any] | None = None, **options: Any
    ) -> SelectiveLM:
        defaults: dict[str, Any] = {
            "attn_implementation": "sdpa",
            "activation_checkpointing": False,
            "compile": False,
            "logits_cache_bytes": 0,
        } | options
        folder = None if init_from is None else str(init_from)
        torch.manual_seed(0)
        return build_lm(tokenizer, 300, folder, LLAMA | (fields or {}), **defaults)

    return make


@pytest.fixture
def saved(tmp_path, tokenizer, build) -> Path:
    save_model(tmp_path / "model", build().model, tokenizer, "a card", {"seed": 0})
    return tmp_path / "model"


def test_new_model_is_float32_and_knows_the_special_ids(build, tokenizer):
    lm = build(fields={"dtype": "bfloat16"})
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    for config in (lm.model.config, lm.model.generation_config):
        ids = (config.eos_token_id, config.pad_token_id)
        assert ids == (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
        assert config.bos_token_id == tokenizer.bos_token_id
    assert lm.model.config.vocab_size == 300


def test_vocabulary_smaller_than_the_tokenizers_is_refused_and_a_padded_one_is_not(build):
    with pytest.raises(UserError, match="vocab_size is 299, the tokenizer has 300 tokens"):
        build(fields={"vocab_size": 299})
    assert head_arguments(build(fields={"vocab_size": 304}).model)["weight"].shape[0] == 304


def test_a_term_that_a_model_adds_to_its_own_loss_is_refused(build, saved):
    fields = {"model_type": "mixtral", "output_router_logits": True, "num_local_experts": 2}
    said = "output_router_logits is True, .* would be left out"
    with pytest.raises(UserError, match=f"^model.architecture: {said}"):
        build(fields=fields)
    new_model(LLAMA | fields, 300, None).save_pretrained(saved)
    with pytest.raises(UserError, match=f"^config.json of {saved}: {said}"):
        build(saved)
    model = build().model
    assert loss_terms(model) is None
    model.config.z_loss_coefficient = 0.1  # Bamba's
    assert loss_terms(model) == "z_loss_coefficient is 0.1"


def test_attention_that_the_class_lacks_is_refused_and_null_takes_what_it_has(build):
    with pytest.raises(UserError, match="^model.architecture makes no .* Gemma2ForCausalLM "):
        build(fields=ARCHITECTURES["gemma2"], attn_implementation="sdpa")
    lm = build(fields=ARCHITECTURES["gemma2"], attn_implementation=None)
    assert lm.model.config._attn_implementation == "eager"
    lm = build(attn_implementation=None)
    assert lm.model.config._attn_implementation == "sdpa"


def test_attention_that_is_not_installed_is_refused_by_name(saved, build):
    message = f"^no causal LM at {saved} with attn_implementation=flash_attention_2: [^\n]+$"
    with pytest.raises(UserError, match=message):
        build(saved, attn_implementation="flash_attention_2")


def test_a_quantized_base_is_refused_before_its_weights_are_read(saved, build):
    path = saved / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))
    (saved / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=f"^config.json of {saved} has a quantization_config .fp8."):
        build(saved)
    config["quantization_config"] = {"quant_method": "quanto"}  # its package is not installed
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^no causal LM at {saved}: [^\n]*quanto"):
        load_model(saved)


def test_what_transformers_will_not_save_is_refused_at_the_start(saved, build):
    path = saved / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    message = f"^generation_config.json of {saved} cannot be saved again: [^\n]*temperature"
    with pytest.raises(UserError, match=message):
        build(saved)


def test_weights_of_other_shapes_are_one_sentence(saved):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 25}))
    with pytest.raises(UserError, match=f"^no causal LM at {saved}: [^\n]+$"):
        load_model(saved)


def test_loaded_model_trains_from_the_same_weights(saved, build):
    lm = build(saved)
    assert lm.training and lm.model.training  # from_pretrained leaves evaluation mode
    for name, parameter in build().named_parameters():
        assert torch.equal(parameter, lm.get_parameter(name))


def test_bfloat16_folder_is_loaded_as_float32(saved, build):
    load_model(saved).bfloat16().save_pretrained(saved)
    assert {p.dtype for p in build(saved).parameters()} == {torch.float32}


def test_fields_of_a_loaded_config_are_overridden(saved, build, tokenizer, tmp_path):
    """transformers' own from_pretrained(folder, rope_theta=...) leaves the saved one in force."""
    override = {"rope_theta": 500.0, "max_position_embeddings": 96, "attention_dropout": 0.25}
    lm = build(saved, override=override)
    config = LlamaConfig(vocab_size=300, **(LLAMA | override))  # type: ignore[arg-type]
    meant = LlamaForCausalLM(config).eval()
    meant.load_state_dict(load_file(saved / "model.safetensors"), strict=False)
    meant.tie_weights()
    ids = torch.arange(40)[None]
    plain = load_model(saved)(ids).logits
    with torch.no_grad():
        expected = meant(ids).logits
        assert torch.equal(lm.model.eval()(ids).logits, expected)
        assert (expected - plain).abs().max() > 1e-5
        save_model(tmp_path / "again", lm.model, tokenizer, "a card", {})
        assert torch.equal(load_model(tmp_path / "again")(ids).logits, expected)
    assert position_limit(lm.model.config) == 96
    scaled = build(saved, override={"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    expected_rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert scaled.model.config.rope_parameters == expected_rope
    longer: Any = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    longer |= {"max_position_embeddings": 128}
    rope = build(saved, override=longer).model.config.rope_parameters
    assert rope["original_max_position_embeddings"] == 32  # that it had
    longer["rope_scaling"]["original_max_position_embeddings"] = 16
    rope = build(saved, override=longer).model.config.rope_parameters
    assert rope["original_max_position_embeddings"] == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"rope_thetta": 5e5}, "model.override.rope_thetta is no field of LlamaConfig; it has"),
        (
            {"hidden_size": 48},
            r"48.: \S+ would be \[300, 48\], .* has \[300, 16\]: ",
        ),
        ({"vocab_size": 301}, r"would be \[301, 16\], the model has \[300, 16\]: what weights"),
        ({"attention_dropout": "much"}, "attention_dropout is 'much', a number as 0.0"),
        (
            {"rope_theta": "big"},
            "rope_theta is 'big', a number as 10000.0 is needed",
        ),
        ({"rope_scaling": {"rope_theta": True}}, "model.override.rope_theta is True, a number as"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "with model.override=.*spiral"),
    ],
)
def test_overrides_that_the_weights_or_the_config_do_not_take(saved, build, override, message):
    with pytest.raises(UserError, match=f"^[^\n]*{message}"):
        build(saved, override=override)
    with pytest.raises(UserError, match="there is no model.init_from whose config it would change"):
        build(override=override)


def test_layers_with_positions_of_their_own_are_named():
    config: Any = Gemma3TextConfig(num_hidden_layers=2)
    with pytest.raises(UserError, match="name whose, .*sliding_attention, full_attention"):
        override_config(config, {"rope_theta": 5e5})
    before = dict(config.rope_parameters["sliding_attention"])
    override_config(config, {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}})
    assert config.rope_parameters["full_attention"] == {"rope_type": "default", "rope_theta": 5e5}
    assert config.rope_parameters["sliding_attention"] == before
    with pytest.raises(
        UserError, match=r"has \['rope_theta'\], GPT2Config has no rotary positions"
    ):
        override_config(GPT2Config(), {"rope_theta": 5e5})


def test_folder_with_another_tokenizer_is_refused(saved, build):
    train_tokenizer(["other text, other tokens " * 9], 270).save_pretrained(saved)
    with pytest.raises(UserError, match=f"init_from {saved} has tokenizer .*, the corpus has"):
        build(saved)


def test_missing_weights_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    message = f"{saved} lacks 1 weights of LlamaForCausalLM, e.g. model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=message):
        load_model(saved)


@pytest.mark.parametrize("damage", ["absent", "garbage", "truncated", "no config"])
def test_damaged_folder_is_one_sentence(saved, damage):
    weights = saved / "model.safetensors"
    if damage == "absent":
        shutil.rmtree(saved)
    elif damage == "no config":
        (saved / "config.json").unlink()
    else:
        weights.write_bytes(b"no" * 99 if damage == "garbage" else weights.read_bytes()[:-64])
    with pytest.raises(UserError, match=f"^no causal LM at {saved}: [^\n]+$"):
        load_model(saved)


def test_activation_checkpointing_computes_twice_and_gets_the_same(saved, build):
    results = []
    for checkpointing in (False, True):
        lm, batch = build(saved, activation_checkpointing=checkpointing), make_batch()
        calls = []
        attention: Any = lm.get_submodule("model.model.layers.0.self_attn")
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        loss = lm(batch, everything(batch)).loss
        loss.backward()
        results.append((loss.detach(), gradients(lm)))
        assert len(calls) == 1 + checkpointing
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name])


def test_compiled_layers_have_no_backward_pass_along_selected_rows(build):
    with pytest.raises(UserError, match="backward=selected runs layers by itself: model.compile=f"):
        build(compile=True, backward="selected")
    assert build(backward="selected").backward == "selected"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("documents", "backend"), [(False, "inductor"), (True, "aot_eager")])
def test_compiled_backbone_gets_the_same(build, monkeypatch, documents, backend):
    """What a compiler of C++ makes takes it ten seconds a graph: of one layer, once."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    results = []
    for compiled in (False, True):
        lm = build(fields={"num_hidden_layers": 1}, compile=compiled)
        batch = make_batch(documents=documents)
        output = lm(batch, top_excess(batch, 0.0, 0.5))
        output.loss.backward()
        results.append((lm.state_dict().keys(), output.token_loss, gradients(lm)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-5)
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_gguf_is_the_model_and_tokenizer_that_it_was_written_from(tokenizer, tmp_path):
    model = new_model(LLAMA, len(tokenizer), None)
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    for name in (tmp_path / "m.gguf", tmp_path):
        loaded = load_model(name)
        found, expected = loaded.state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        ids = torch.tensor([load_tokenizer(name).encode("one two three")])
        assert ids.tolist() == [tokenizer.encode("one two three")]
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_ids_and_template_of_a_loaded_model_stay_and_eos_is_among_those_to_stop_at(
    saved, tokenizer, build, tmp_path
):
    kept = {"bos_token_id": 3, "pad_token_id": 5, "suppress_tokens": [8]}
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    generation = {"eos_token_id": [9, 7], **kept}
    (saved / "generation_config.json").write_text(json.dumps(generation))
    load_tokenizer(saved).save_pretrained(saved)
    (saved / "chat_template.jinja").write_text(CHATML)
    mine = load_tokenizer(saved)
    mine.chat_template = None  # of the corpus
    torch.manual_seed(0)
    lm = build_lm(mine, 300, str(saved), {}, None, False, False, 0)
    save_model(tmp_path / "out", lm.model, mine, "card", {})
    assert broken_rules(tmp_path / "out") == []
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found.items() >= kept.items()
    end = tokenizer.eos_token_id
    assert found["eos_token_id"] == [9, 7, end]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [7, end]
    assert load_tokenizer(tmp_path / "out").chat_template == CHATML


def test_a_model_of_chats_stops_at_the_end_of_a_turn(tokenizer, build, saved, tmp_path):
    other = load_tokenizer(saved)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    other.chat_template = CHATML
    other.save_pretrained(saved)
    eos, end = other.eos_token_id, other.convert_tokens_to_ids("<|im_end|>")
    for folder in (None, str(saved)):
        fields = LLAMA | {"vocab_size": 302}
        if folder is not None:
            new_model(fields, 302, None).save_pretrained(saved)
        lm = build_lm(other, 302, folder, fields, None, False, False, 0)
        stops = lm.model.generation_config.eos_token_id
        assert stops[-2:] == [eos, end] and len(stops) == (2 if folder is None else 3)


# ---- sharded --------------------------------------------------------------------------------


def sharded_gradients(folder: str, layers_too: str, backward: str) -> None:
    """One of two processes: its window's loss, every gradient gathered, against one process."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    whole = make_batch()
    plain = make_lm("llama tied")
    plain.backward = backward
    plain(whole, top_excess(whole, 4.0, 0.5, "sequence")).loss.backward()
    expected = gradients(plain)
    lm = make_lm("llama tied")
    lm.backward = backward
    mesh = init_device_mesh("cpu", (2,))
    if layers_too == "True":
        layers: Any = lm.get_submodule("model.model.layers")
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(lm, mesh=mesh)
    mine = {key: value[rank : rank + 1] for key, value in whole.items()}
    total = 6 + 6  # round(0.5 * 12) and round(0.5 * 11); the gradients are averaged over 2 ranks
    lm(mine, top_excess(mine, 4.0, 0.5, "sequence"), denominator=total / 2).loss.backward()
    norm = torch.nn.utils.get_total_norm(expected.values())
    shards = [p.grad for p in lm.parameters() if p.grad is not None]
    torch.testing.assert_close(norm_of(shards), norm)
    scale_gradients(shards, 0.25)  # as the trainer does, once, after the backward pass
    for name, parameter in lm.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(
            parameter.grad.full_tensor(), 0.25 * expected[name], rtol=1e-4, atol=1e-6
        )
    assert torch.equal(lm(mine).loss, plain(mine).loss)
    dist.destroy_process_group()


def test_logits_cache_changes_gradients_by_its_rounding_alone():
    batch = make_batch()
    results: list[Any] = []
    for size in (0, 2**20):
        lm = make_lm("llama")
        lm.logits_cache_bytes = size
        out = lm(batch, top_excess(batch, 4.0, 0.5))
        out.loss.backward()
        results.append((out.token_weight, {n: p.grad for n, p in lm.named_parameters()}))
    (selected, plain), (again, cached) = results
    assert torch.equal(selected, again)
    assert any(not torch.equal(plain[name], cached[name]) for name in plain)
    for name, grad in plain.items():
        assert (cached[name] - grad).norm() <= 1e-3 * grad.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers_too", "backward"), [(False, "exact"), (True, "exact"), (True, "selected")]
)
def test_fully_sharded_module_has_the_gradients_of_one_process(tmp_path, layers_too, backward):
    words = [str(tmp_path), str(layers_too), backward]
    command = [sys.executable, __file__, "sharded_gradients", *words]
    codes, said = warm.run_ranks(2, command)
    assert codes == [0, 0], said


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
