"""Model FLOPs: the arithmetic that a token needs, whatever a device does for it."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def flops_per_token(model: PreTrainedModel, seq_len: int, select_ratio: float) -> float:
    """Floating-point operations that training needs for one token of the batch, selected or not.

        6 * P  +  (2 + 4 * select_ratio) * V * D  +  12 * L * D * T

    P parameters but embeddings and head, V vocabulary, D width, L layers, T = seq_len: PaLM
    (arXiv 2204.02311), appendix B, with a multiply-add counted as 2, 2 forward and 4 backward. The
    head (tied or not) scores every token forward; its backward sees the selected share only. As in
    PaLM nothing computed twice is counted twice: that the loss recomputes the logits of selected
    tokens costs another 2 * select_ratio * V * D on the device. For dense models.
    """
    body, head, attention = flops_parts(model, seq_len)
    return 6 * body + (2 + 4 * select_ratio) * head + 12 * attention


def forward_flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """The forward's part of `flops_per_token`: what scoring a token needs."""
    body, head, attention = flops_parts(model, seq_len)
    return 2 * body + 2 * head + 4 * attention


def flops_parts(model: PreTrainedModel, seq_len: int) -> tuple[int, int, int]:
    """P, V * D and L * D * T of `flops_per_token`."""
    head: Any = model.get_output_embeddings().weight  # type: ignore[union-attr]
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    left_out = {id(parameter) for parameter in [head, *tables]}
    body = sum(p.numel() for p in model.parameters() if id(p) not in left_out)
    config = model.config.get_text_config()
    return body, head.numel(), config.num_hidden_layers * config.hidden_size * seq_len
