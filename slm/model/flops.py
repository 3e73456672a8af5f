"""Model FLOPs: the arithmetic that a token needs, whatever a device does for it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from slm.model.architecture import text_config

# How mixtures of experts name the experts that a token goes to, and whether there are any.
CHOSEN_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
EXPERTS_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def flops_per_token(
    model: PreTrainedModel, seq_len: int, select_ratio: float, backward: str = "exact"
) -> float | None:
    """Floating-point operations that training needs for one token of the batch, selected or not.

        6 * P  +  (2 + 4 * select_ratio) * V * D  +  12 * L * D * T

    P parameters but embeddings and head, V vocabulary, D width, L layers, T = seq_len: PaLM
    (arXiv 2204.02311), appendix B, with a multiply-add counted as 2, 2 forward and 4 backward. The
    head (tied or not) scores every token forward; its backward sees the selected share only. As in
    PaLM nothing computed twice is counted twice: that the loss recomputes the logits of selected
    tokens costs another 2 * select_ratio * V * D on the device. With backward=selected the body and
    the queries of attention have the head's factor: (2 + 4 * select_ratio) * P and
    (4 + 8 * select_ratio) * L * D * T. Of a mixture's experts P counts the share that a token goes
    to; None where that is not known.
    """
    parts = flops_parts(model, seq_len)
    if parts is None:
        return None
    body, head, attention = parts
    share = select_ratio if backward == "selected" else 1.0
    return (2 + 4 * share) * body + (2 + 4 * select_ratio) * head + (4 + 8 * share) * attention


def forward_flops_per_token(model: PreTrainedModel, seq_len: int) -> float | None:
    """The forward's part of `flops_per_token`: what scoring a token needs."""
    parts = flops_parts(model, seq_len)
    if parts is None:
        return None
    body, head, attention = parts
    return 2 * body + 2 * head + 4 * attention


def flops_parts(model: PreTrainedModel, seq_len: int) -> tuple[float, int, int] | None:
    """P, V * D and L * D * T of `flops_per_token`."""
    head: Any = model.get_output_embeddings().weight  # type: ignore[union-attr]
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    left_out = {id(parameter) for parameter in [head, *tables]}
    config = text_config(model.config)
    weights = {n: p for n, p in model.named_parameters() if id(p) not in left_out}
    body = active_parameters(weights, config)
    if body is None:
        return None
    return body, head.numel(), config.num_hidden_layers * config.hidden_size * seq_len


def active_parameters(
    weights: Mapping[str, nn.Parameter], config: PreTrainedConfig
) -> float | None:
    """Those that one token is multiplied with. Transformers stacks experts: (experts, ...)."""
    experts, chosen = first_of(config, EXPERTS_FIELDS), first_of(config, CHOSEN_FIELDS)
    total = sum(weight.numel() for weight in weights.values())
    if experts is None:
        return total
    named = {n: w for n, w in weights.items() if "experts" in n.split(".")[:-1] and w.ndim > 1}
    stacked = {n for n, w in weights.items() if w.ndim == 3 and len(w) == experts}
    if chosen is None or not stacked or stacked != {n for n, w in named.items() if w.ndim == 3}:
        return None  # a mixture of another build
    in_experts = sum(weight.numel() for weight in named.values() if len(weight) == experts)
    return total - in_experts + in_experts / experts * chosen


def first_of(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    """The first of these fields that this kind of model has and gives a value; 0 is none."""
    return next((v for name in names if (v := getattr(config, name, None))), None)
