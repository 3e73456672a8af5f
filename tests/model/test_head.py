"""A model whose logits are not its head applied to its hidden states is refused by name."""

from typing import Any

import pytest
import torch

import slm.model.head as head_module
from model_helpers import LLAMA, REFUSED, TRAINABLE, VOCAB, make_batch, make_lm
from slm.errors import UserError
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM
from slm.model.head import check_head, head_arguments, hidden_states
from slm.store.windows import Batch


def full_batch() -> Batch:
    """Every token is a target."""
    batch = make_batch()
    return batch | {"targets": batch["input_ids"].roll(-1, 1)}


@pytest.mark.parametrize("name", TRAINABLE)
def test_head_applied_to_the_hidden_states_gives_the_models_own_logits(name):
    model, batch = make_lm(name).model, full_batch()
    head = head_arguments(model)
    z = hidden_states(model, batch) @ head["weight"].T
    z = head["logit_scale"] * (z if head["bias"] is None else z + head["bias"])
    if head["softcap"] is not None:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    torch.testing.assert_close(z, model(batch["input_ids"]).logits, rtol=1e-5, atol=1e-5)
    check_head(model, batch)


@pytest.mark.parametrize("name", REFUSED)
def test_stock_model_with_other_logits_is_refused_by_name(name):
    lm = make_lm(name)
    with pytest.raises(UserError, match=f"{type(lm.model).__name__}: its logits are not its head"):
        check_head(lm.model, full_batch())


@pytest.mark.parametrize(
    "alter",
    [
        lambda z: 1.01 * z,
        lambda z: z + 0.01 * torch.arange(VOCAB),
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z.clamp(max=40),
        lambda z: z * torch.nan,
    ],
    ids=["scale", "bias", "softcap", "clamp", "nan"],
)
def test_altered_logits_are_refused_even_where_they_are_small(alter, monkeypatch):
    lm = SelectiveLM(new_model(LLAMA, VOCAB, None))  # as new: no logit reaches 1
    forward = lm.model.forward

    def altered(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.logits = alter(output.logits)
        return output

    check_head(lm.model, full_batch())
    monkeypatch.setattr(lm.model, "forward", altered)
    with pytest.raises(UserError, match=r"LlamaForCausalLM: its logits .* softcap or scale under"):
        check_head(lm.model, full_batch())


@pytest.mark.parametrize(
    ("name", "known", "fields"),
    [
        ("gemma2", "SOFTCAP_FIELDS", {"final_logit_softcapping": 30.0}),
        ("cohere", "SCALE_FIELDS", {}),
        ("granite", "DIVISOR_FIELDS", {}),
    ],
)
def test_field_under_another_name_is_refused(name, known, fields, monkeypatch):
    monkeypatch.setattr(head_module, known, ("a_name_of_tomorrow",))
    with pytest.raises(UserError, match="head understood|understood: Head"):
        check_head(make_lm(name, **fields).model, full_batch())
