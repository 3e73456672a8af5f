"""New models from the fields of a config, and what is said about fields that make none."""

import pytest

from model_helpers import LLAMA
from slm.architecture import new_model
from slm.errors import UserError


def test_a_typing_error_in_the_architecture_is_refused():
    with pytest.raises(UserError, match="hiden_size is no field of LlamaConfig.*hidden_size"):
        new_model(LLAMA | {"hiden_size": 8}, 300, None)
    with pytest.raises(UserError, match="model_type is 'lama'"):
        new_model(LLAMA | {"model_type": "lama"}, 300, None)
    with pytest.raises(UserError, match="makes no causal LM: .*'hidden_size' expected int"):
        new_model(LLAMA | {"hidden_size": "16"}, 300, None)
    new_model(LLAMA | {"rope_theta": 5000.0}, 300, None)
