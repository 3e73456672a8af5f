"""New models from the fields of a config, and what is said about fields that make none."""

import pytest
from transformers import CONFIG_MAPPING

from model_helpers import LLAMA
from slm.errors import UserError
from slm.model.architecture import new_model


def test_a_typing_error_in_the_architecture_is_refused():
    with pytest.raises(UserError, match="hiden_size is no field of LlamaConfig.*hidden_size"):
        new_model(LLAMA | {"hiden_size": 8}, 300, None)
    with pytest.raises(UserError, match="model_type is 'lama'"):
        new_model(LLAMA | {"model_type": "lama"}, 300, None)
    with pytest.raises(UserError, match="makes no causal LM: .*'hidden_size' expected int"):
        new_model(LLAMA | {"hidden_size": "16"}, 300, None)
    new_model(LLAMA | {"rope_theta": 5000.0}, 300, None)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "starcoder2", "olmo2"])
def test_a_field_that_only_the_model_code_knows_is_one(model_type):
    fields = LLAMA | {"model_type": model_type, "head_dim": 6}  # 4 heads of 16 / 4 without it
    model = new_model(fields, 300, None)
    assert type(model.config) is CONFIG_MAPPING[model_type]
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (4 * 6, 16)
    for name in ("haed_dim", "base_config_key"):
        with pytest.raises(UserError, match=f"model.architecture.{name} is no field of "):
            new_model(fields | {name: 6}, 300, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3, .* num_attention_heads, which is 4",
        ),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, it must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, it must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, it must be at least 1"),
        ({"hidden_act": "bogus"}, "makes no causal LM: KeyError: 'bogus'"),
        ({"pad_token_id": 1000}, "makes no causal LM: AssertionError: Padding_idx"),
        ({"rope_scaling": {"rope_type": "yarnn"}}, "makes no causal LM: KeyError: 'yarnn'"),
        ({"model_type": "t5"}, "model_type is 't5', of which transformers has no causal LM"),
        ({"model_type": "llama4"}, "model_type is 'llama4', a model of more than text"),
        ({"model_type": "dbrx"}, "num_key_value_heads is no field|makes no causal LM"),
    ],
)
def test_fields_that_make_no_model_are_one_sentence(fields, message):
    with pytest.raises(UserError, match=f"^model.architecture[^\n]*{message}[^\n]*$"):
        new_model(LLAMA | fields, 300, None)


def test_an_attention_that_is_not_installed_is_one_sentence():
    message = "^model.architecture makes no causal LM with attn_implementation=flash_attention_2: "
    with pytest.raises(UserError, match=message):
        new_model(LLAMA, 300, "flash_attention_2")
