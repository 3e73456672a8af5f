"""The output layer of a causal LM of transformers, as the losses of `slm_kernels` take it.

Its logits must be ``logit_scale * (hidden @ weight.T + bias)``, optionally followed by
``softcap * tanh(logits / softcap)``. `check_head` finds the models whose logits are something else.

Letters: B windows, T positions, D width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from slm.errors import UserError
from slm.model.architecture import text_config
from slm.model.parallel import vocab_group_of
from slm_kernels import token_cross_entropy

# How model families name the two things that change logits after the head.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2 and 3; RecurrentGemma
SCALE_FIELDS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon H1; Muse
DIVISOR_FIELDS = ("logits_scaling",)  # Granite
# Terms that a model of transformers adds to its own loss where these are set: mixtures; Bamba.
LOSS_TERM_FIELDS = ("output_router_logits", "z_loss_coefficient")
HEAD_TOLERANCE = 1e-3  # of the largest loss, or nats where that is below 1
PROBE_LOGIT = 60.0  # a soft cap does not show in the small logits of a new model


class Head(NamedTuple):
    """What the logits are made of beyond the head's weight and bias."""

    logit_scale: float
    softcap: float | None


def head_of(model: PreTrainedModel) -> Head:
    fields = text_config(model.config).to_dict()
    present = {name: value for name, value in fields.items() if value is not None}
    scale = 1.0
    for name in present.keys() & set(SCALE_FIELDS):
        scale *= present[name]
    for name in present.keys() & set(DIVISOR_FIELDS):
        scale /= present[name]
    caps = [present[name] for name in SOFTCAP_FIELDS if name in present]
    return Head(scale, caps[0] if caps else None)


def loss_terms(model: PreTrainedModel) -> str | None:
    """What our loss would leave out of the model's own, as `field is value`; None where nothing."""
    fields = text_config(model.config).to_dict()
    present = [name for name in LOSS_TERM_FIELDS if name in fields and fields[name]]
    return f"{present[0]} is {fields[present[0]]}" if present else None


def check_causal(model: Any) -> None:
    """Refuse what is no decoder with an output layer over the vocabulary."""
    is_model = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    if not is_model or model.config.is_encoder_decoder:
        raise UserError(f"{type(model).__name__} is no causal LM of transformers")


def projection_of(model: PreTrainedModel) -> nn.Module:
    """The output layer: a weight (V, D) and a bias (V,) or None."""
    layer = model.get_output_embeddings()
    assert layer is not None, f"{type(model).__name__} has no output embeddings"
    return layer


def head_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """weight, bias, logit_scale and softcap, for the losses of `slm_kernels`; of a head that is cut
    over the vocabulary its ranks."""
    projection = projection_of(model)
    given = {"weight": projection.weight, "bias": projection.bias} | head_of(model)._asdict()
    group = vocab_group_of(projection.weight)  # type: ignore[arg-type]
    return given if group is None else given | {"vocab_group": group}


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    names = [name for name in ("input_ids", "position_ids") if name in batch]
    return {name: batch[name] for name in names} | {"use_cache": False}


def hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:  # (B, T, D)
    return model.base_model(**model_inputs(batch)).last_hidden_state


@torch.no_grad()
def check_documents(
    model: PreTrainedModel,
    ids: Tensor,  # (B, T)
    needed_by: str,
    tolerance: float = 1e-5,  # of the largest hidden state
) -> None:
    """Refuse a model that looks back past a restart of position_ids.

    Recurrent models do, and those that take their mask or positions from elsewhere.
    """
    index, half = torch.arange(ids.shape[1], device=ids.device), ids.shape[1] // 2
    restarted = torch.where(index < half, index, index - half).expand_as(ids)
    others = torch.where(index < half, (ids + 1) % len(head_arguments(model)["weight"]), ids)
    one, other = (
        hidden_states(model, {"input_ids": tokens, "position_ids": restarted})[:, half:]
        for tokens in (ids, others)
    )
    leak = (one - other).abs().max().item()
    if not leak <= tolerance * one.abs().max().item():
        raise UserError(
            f"{type(model).__name__} does not keep documents apart (a token of one changes the "
            f"hidden states of the next by {leak:.3g}), which {needed_by} needs"
        )


@torch.no_grad()
def check_head(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model whose logits our loss does not reproduce: as they are, and made large.

    batch: input_ids (B, T), targets (B, T), none of them ignored, and position_ids where they are
    """
    check_causal(model)
    if model.base_model is model:  # llama4, mllama: their backbone has another name
        raise UserError(f"{type(model).__name__} has no base model that gives hidden states")
    largest = compare_head(model, batch, gain=1.0)
    compare_head(model, batch, gain=PROBE_LOGIT / max(largest, 1e-6))


def compare_head(model: PreTrainedModel, batch: Mapping[str, Tensor], gain: float) -> float:
    """Our loss against the model's own with the head's output times `gain`; the largest logit."""
    arguments = head_arguments(model)
    arguments["logit_scale"] *= gain
    hidden = hidden_states(model, batch)
    ours = token_cross_entropy(hidden, targets=batch["targets"], **arguments).loss
    logits = amplified_logits(model, batch, gain).flatten(0, 1)
    theirs = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    difference = (ours.flatten() - theirs).abs().max().item()
    tolerance = max(HEAD_TOLERANCE, 4 * torch.finfo(hidden.dtype).eps)  # their logits are rounded
    if not difference <= tolerance * max(1.0, theirs.abs().max().item()):
        raise UserError(
            f"{type(model).__name__}: its logits are not its head applied to its hidden states; "
            f"the loss differs by {difference:.3g} nats on one batch, the head's output times "
            f"{gain:.3g} (understood: {head_of(model)}); a softcap or scale under another name?"
        )
    return logits.abs().max().item()


def amplified_logits(
    model: PreTrainedModel, batch: Mapping[str, Tensor], gain: float
) -> Tensor:  # (B, T, V)
    def amplify(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return gain * output

    handle = projection_of(model).register_forward_hook(amplify)
    try:
        return model(**model_inputs(batch)).logits.float()
    finally:
        handle.remove()
